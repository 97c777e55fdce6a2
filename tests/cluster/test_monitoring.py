"""How a job ends, and how often it speaks."""

from __future__ import annotations

import subprocess
import sys

import pytest

from pbd_ray.cluster import monitoring
from pbd_ray.config import ConfigError, RunError


def _raise(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (ConfigError("a.yaml: unknown key 'x'"), 2, "error: a.yaml: unknown key 'x'"),
        (RunError("slice 3 took down 3 workers"), 1, "error: slice 3 took down 3 workers"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_known_ends_are_one_line(
    error: BaseException, status: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert monitoring.exit_status(lambda: _raise(error)) == status
    assert capsys.readouterr().err == f"{line}\n"


def test_a_fault_of_ours_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        monitoring.exit_status(lambda: 1 / 0)


def test_nobody_reads() -> None:
    """`... | head`: no traceback, and the status of a process that SIGPIPE ended."""
    module = "pbd_ray.cluster.monitoring"
    code = f"import sys, {module} as m; sys.exit(m.exit_status(lambda: print('x' * 10**6)))"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as process:  # type: ignore[call-overload]
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


def test_throttled(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    said: list[str] = []
    monkeypatch.setattr(monitoring.time, "monotonic", lambda: now[0])
    sometimes = monitoring.throttled(10.0, said.append)
    for moment, line in ((100.0, "a"), (105.0, "b"), (110.0, "c"), (111.0, "d")):
        now[0] = moment
        sometimes(line)
    assert said == ["a", "c"]


def test_status_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two thirds of what this driver found to do took 40 s, so the last third takes 20 s."""
    now = [100.0]
    said: list[str] = []
    monkeypatch.setattr(monitoring.time, "monotonic", lambda: now[0])
    status = monitoring.Status("round 1: scores", 10.0, said.append)
    for moment, done, facts in (
        (101.0, 0.4, ("6 of 8 candidates", "", "2 workers")),
        (105.0, 0.5, ("left out",)),
        (140.0, 0.8, ("2 workers",)),
        (155.0, 0.8, ()),
        (180.0, 0.8, ()),
        (190.0, 1.0, ()),
    ):
        now[0] = moment
        status(done, *facts, begun=0.4)
    assert said == [
        "round 1: scores: 40%, 6 of 8 candidates, 2 workers",
        "round 1: scores: 80%, 2 workers, 20 s left",
        "round 1: scores: 80%, 5 s left",
        "round 1: scores: 80%, 0 s left",
        "round 1: scores: 100%",
    ]


@pytest.mark.parametrize(
    ("took_seconds", "left"),
    [(89, "89 s"), (90, "1.5 min"), (5399, "90 min"), (5400, "1.5 h"), (36000, "10 h")],
)
def test_what_is_left_is_told_in_fitting_units(
    took_seconds: float, left: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    said: list[str] = []
    monkeypatch.setattr(monitoring.time, "monotonic", lambda: now[0])
    status = monitoring.Status("align", 1.0, said.append)
    now[0] = took_seconds
    status(0.5)
    assert said == [f"align: 50%, {left} left"]
