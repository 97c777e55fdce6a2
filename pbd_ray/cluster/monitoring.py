"""Progress for people: plain lines with the time, the same in a terminal and in `ray job logs`."""

from __future__ import annotations

import time
from collections.abc import Callable

_START = time.monotonic()


def say(line: str) -> None:
    """Print one line of progress, with minutes and seconds since the start of this process."""
    minutes, seconds = divmod(int(time.monotonic() - _START), 60)
    print(f"[{minutes:3d}:{seconds:02d}] {line}", flush=True)


def throttled(seconds: float) -> Callable[[str], None]:
    """`say` for lines that come often: at most one in `seconds`, the rest are left out."""
    last = -seconds

    def sometimes(line: str) -> None:
        nonlocal last
        now = time.monotonic() - _START
        if now - last >= seconds:
            last = now
            say(line)

    return sometimes
