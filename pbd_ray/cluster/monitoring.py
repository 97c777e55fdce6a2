"""Progress for people: plain lines with the time, the same in a terminal and in `ray job logs`."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable

from pbd_ray.cluster.metrics_export import STAGE_DONE
from pbd_ray.config import RunError, UserError

_START = time.monotonic()


def say(line: str) -> None:
    """Print one line of progress, with minutes and seconds since the start of this process."""
    minutes, seconds = divmod(int(time.monotonic() - _START), 60)
    print(f"[{minutes:3d}:{seconds:02d}] {line}", flush=True)


def exit_status(action: Callable[[], int | None]) -> int:
    """Run a job's action; what can go wrong in a known way ends in one line and not in a traceback.

    Returns:
        0, or what the action returns; 2 for what the user can mend; 1 for a run that cannot go on; 130 after
        an interrupt; 141 where nobody reads what is printed any more (`| head`).
    """
    try:
        status = action() or 0
        sys.stdout.flush()
        return status
    except (UserError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes once more
        return 141


def throttled(seconds: float, tell: Callable[[str], None] = say) -> Callable[[str], None]:
    """`tell` for lines that come often: at most one in `seconds`, the rest are left out."""
    last: float | None = None

    def sometimes(line: str) -> None:
        nonlocal last
        now = time.monotonic()
        if last is None or now - last >= seconds:
            last = now
            tell(line)

    return sometimes


class Status:
    """The status line of a stage, in one form for all of them, at most one in so many seconds.

    As in `round 1: scores: 42%, 6 of 8 candidates, block 3 leads with 0.6421, 2 workers, 3 min left`.
    """

    def __init__(self, stage: str, seconds: float, tell: Callable[[str], None] = say) -> None:
        self._stage = stage
        self._tell = throttled(seconds, tell)
        self._start = self._since = time.monotonic()
        self._done = 0.0
        STAGE_DONE.clear()

    def __call__(self, done: float, *facts: str, begun: float = 0.0) -> None:
        """
        Args:
            done: share of the stage, 0 to 1.
            facts: those that are empty are left out.
            begun: share that was done already when this driver came to the stage; no time was spent on it.
        """
        STAGE_DONE.set(done, stage=self._stage)
        now = time.monotonic()
        if done != self._done:
            self._done, self._since = done, now
        left = ""
        if begun < done < 1:
            pace = (self._since - self._start) / (done - begun)
            left = f"{_span(max(0.0, pace * (1 - done) - (now - self._since)))} left"
        self._tell(f"{self._stage}: {', '.join(filter(None, (f'{done:.0%}', *facts, left)))}")


def _span(seconds: float) -> str:
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 1.5 * length:
            return f"{seconds / length:.{1 if seconds < 10 * length else 0}f} {unit}"
    return f"{seconds:.0f} s"
