"""Which process this is, so that another one can later tell whether it still lives."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path

_FIRST_NAMESPACE = "pid:[4026531836]"
"""The namespace of a machine's own pids, outside of any container (Linux: PROC_PID_INIT_INO)."""


@dataclass(frozen=True)
class Process:
    """A process, distinct from all others on all machines. Empty text: this system does not say."""

    host: str
    machine: str
    """/etc/machine-id."""
    boot: str
    """The kernel's boot id."""
    namespace: str
    """Containers count their pids apart, and may share a host name."""
    pid: int
    ticks: int | None
    """Clock ticks from boot to the start of the process: pids are used again. None: cannot be known."""


def this_process() -> Process:
    return Process(
        host=socket.gethostname(),
        machine=_text("/etc/machine-id"),
        boot=_text("/proc/sys/kernel/random/boot_id"),
        namespace=_namespace(),
        pid=os.getpid(),
        ticks=_ticks(os.getpid()),
    )


def lives(process: Process, me: Process | None = None) -> bool | None:
    """Whether a process still runs; None where that cannot be told from here.

    Args:
        me: who asks; this process by default.
    """
    me = this_process() if me is None else me
    if (process.host, process.machine) != (me.host, me.machine) or not process.boot:
        return None
    if process.boot != me.boot:
        # Of two containers of one name on two machines this says nothing.
        whole = process.machine != "" and process.namespace == me.namespace == _FIRST_NAMESPACE
        return False if whole else None
    if process.namespace != me.namespace or process.ticks is None:
        return None
    try:
        os.kill(process.pid, 0)  # sends nothing
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # another user's
    if not Path(f"/proc/{process.pid}").is_dir():
        return None  # hidden from this user, or it ended just now
    return _ticks(process.pid) == process.ticks


def _ticks(pid: int) -> int | None:
    """Start of a process; None where there is none: one that is dead and not yet buried is none."""
    try:
        # The command's name stands in brackets and may hold any character.
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in ("Z", "X") else int(fields[18])


def _namespace() -> str:
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""


def _text(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""
