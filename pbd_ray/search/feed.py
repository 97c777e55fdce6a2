"""Hands out a sweep's slices, stage by stage, and knows which candidates are still in the race.

Pull, not push: whoever is idle takes the next slice. Stages end at a barrier, where the judge may stop
candidates; idle workers may begin the next stage before it, with the candidates of this one, as they would
have nothing else to do. What a candidate that is then stopped has yielded is never looked at.

No clock and no cluster in here: `benchmarks/scale.py` drives the same object with simulated workers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Container, Sequence

import pyarrow as pa

from pbd_ray.config import UserError
from pbd_ray.search.state import Slice, Work

Judge = Callable[[int, tuple[int, ...]], tuple[int, ...]]
"""(the stage that has ended, candidates in it) -> those that go on."""
AHEAD = 1
"""How many stages beyond the open one may be begun."""


class SliceFeed:
    """A sweep that is not at its end.

    Args:
        plan: all slices, stages ascending from 0.
        candidates: blocks in the race from the start; none for an evaluation.
        done: indices of slices that are scored already. A stage of which nothing is left is judged at once.
        keep: gets the rows of each slice, once.
        judge: called at every barrier but the last stage's end; None: no race, all stages are scored whole.
        lost: gets each slice that cannot be scored, and why; None: the first one ends the sweep.

    Attributes:
        raced: for each stage that counts, the candidates in it.
        alive: the candidates that no judge has stopped yet.
    """

    def __init__(
        self,
        plan: Sequence[Slice],
        candidates: tuple[int, ...],
        done: Container[int],
        keep: Callable[[Work, pa.Table], None],
        judge: Judge | None = None,
        lost: Callable[[Work, UserError], None] | None = None,
    ) -> None:
        stages = max((piece.stage for piece in plan), default=-1) + 1
        self._waiting: list[deque[Slice]] = [deque() for _ in range(stages)]
        self._missing: list[set[int]] = [set() for _ in range(stages)]
        for piece in plan:
            if piece.index not in done:
                self._waiting[piece.stage].append(piece)
                self._missing[piece.stage].add(piece.index)
        self._keep, self._judge, self._lost = keep, judge, lost
        self._videos = {piece.index: len(piece.videos) for piece in plan}
        self._stage = 0
        self.raced, self.alive = [candidates], candidates
        self._pass_barriers()

    @property
    def ended(self) -> bool:
        """Nothing is left to be scored; what is still being scored is not needed."""
        return self._stage >= len(self._missing)

    @property
    def planned(self) -> int:
        """Slices of all stages, scored or not."""
        return len(self._videos)

    @property
    def remaining(self) -> int:
        """Slices that are not scored, of all stages."""
        return 0 if self.ended else sum(map(len, self._missing))

    @property
    def seen(self) -> float:
        """Share of the videos that is scored."""
        missing = sum(self._videos[index] for indices in self._missing for index in indices)
        return 1 - missing / max(1, sum(self._videos.values()))

    def take(self) -> Work | None:
        """The next slice with the candidates that are in the race now, or None while none may be begun."""
        if self.ended:
            return None
        for waiting in self._waiting[self._stage : self._stage + 1 + AHEAD]:
            if waiting:
                return Work(waiting.popleft(), self.alive)
        return None

    def put_back(self, work: Work) -> None:
        """A slice that was taken and will not be given: it is the next of its stage."""
        self._waiting[work.piece.stage].appendleft(work.piece)

    def give(self, work: Work, table: pa.Table) -> None:
        """The rows of a slice; of one given twice the second are thrown away."""
        if work.piece.index in self._missing[work.piece.stage]:
            self._keep(work, table)
            self._settle(work.piece)

    def refuse(self, work: Work, error: UserError) -> None:
        """A slice that cannot be scored: the sweep goes on without it if somebody asked to be told.

        Raises:
            UserError: that error, where nobody did.
        """
        if self._lost is None:
            raise error from None
        self._lost(work, error)
        self._settle(work.piece)

    def _settle(self, piece: Slice) -> None:
        self._missing[piece.stage].remove(piece.index)
        self._pass_barriers()

    def _pass_barriers(self) -> None:
        last = len(self._missing) - 1
        while self._stage <= last and not self._missing[self._stage]:
            if self._stage < last and self._judge is not None:
                self.alive = self._judge(self._stage, self.alive)
                if len(self.alive) == 1:  # no further video could change the choice
                    self._stage = last + 1
                    return
            self._stage += 1
            if self._stage <= last:
                self.raced.append(self.alive)
