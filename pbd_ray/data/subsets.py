"""Which videos train, choose and test, told from the names that people give their subsets."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pbd_ray.data.annotation_forms import Problem, Written, WrittenVideo
from pbd_ray.data.json_file import AnnotationError

TRAINING, SELECTION, TEST = "training", "selection", "validation"
"""As `DataConfig` has them by default; `selection` only where people have three subsets."""
TEST_NAMES = ("test", "testing", "validation", "val", "valid")
"""The first of them that has instances is the test subset: ActivityNet's `testing` has none."""
SELECTION_NAMES = ("selection", "validation", "val", "valid")
TEST_SHARE = 0.2


@dataclass(frozen=True, eq=False)
class Assigned:
    """The subset of every video that has a part to play."""

    subsets: Mapping[str, str]
    """Video id -> TRAINING, SELECTION or TEST."""
    notes: tuple[str, ...]
    """How that came about, for people."""
    problems: tuple[Problem, ...]


def assign_subsets(written: Written, path: str, test_names: Sequence[str] = ()) -> Assigned:
    """Say who trains, chooses and tests. Where no video has a subset, a hash of its id draws it.

    Args:
        path: of the annotations.
        test_names: of the subsets that are for testing; empty: one of TEST_NAMES.

    Raises:
        AnnotationError: there is no subset to test on, or none to train on.
    """
    if not any(video.subset for video in written.videos):
        if test_names:
            raise AnnotationError(f"{path}: no video has a subset, --test-subset is {' '.join(test_names)}")
        note = f"no subsets are written: a hash of its id puts {TEST_SHARE:.0%} of the videos into {TEST}"
        return Assigned(_drawn(written.videos), (note,), ())
    roles = _roles(written.videos, path, test_names)
    subsets, problems = {}, []
    for video in written.videos:
        if video.subset in roles:
            subsets[video.id] = roles[video.subset]
        elif not video.subset:
            what = f"empty, though other videos have one; {video.id!r} is left out"
            problems.append(Problem("no subset", f"{video.node.where}, subset: {what}"))
    notes = [f"subset {name!r} becomes {role}" for name, role in roles.items() if name != role]
    others = Counter(video.subset for video in written.videos if video.subset and video.subset not in roles)
    notes += [f"subset {name!r}: no instances, {count} videos left out" for name, count in others.items()]
    return Assigned(subsets, tuple(notes), tuple(problems))


def hashed_subset(id_: str) -> str:
    """TRAINING or TEST, by the id alone: a video that comes later moves no other one."""
    return TEST if _draw(id_) < TEST_SHARE else TRAINING


def _drawn(videos: Sequence[WrittenVideo]) -> dict[str, str]:
    """`hashed_subset` of all; of few videos, where it leaves one side without an instance, the nearest one
    goes there."""
    subsets = {video.id: hashed_subset(video.id) for video in videos}
    ranked = sorted((video.id for video in videos if video.instances), key=_draw)
    if len(ranked) > 1:
        subsets[ranked[0]], subsets[ranked[-1]] = TEST, TRAINING
    return subsets


def _draw(id_: str) -> float:
    return int.from_bytes(hashlib.sha256(id_.encode()).digest()[:8], "big") / 2**64


def _roles(videos: Sequence[WrittenVideo], path: str, test_names: Sequence[str]) -> dict[str, str]:
    """Subset -> its role, of subsets with instances."""
    counts = Counter(video.subset for video in videos if video.subset and video.instances)
    names = sorted(name for name in counts if name)
    known = ", ".join(f"{name!r} ({counts[name]} videos)" for name in names)
    for name in test_names:
        if name not in names:
            raise AnnotationError(f"{path}: --test-subset {name}: the subsets with instances are {known}")
    tests = test_names or _first(names, TEST_NAMES)
    if not tests:
        raise AnnotationError(f"{path}: no test subset among {known}: name it with --test-subset")
    rest = [name for name in names if name not in tests]
    if not rest:
        raise AnnotationError(f"{path}: no training subset beside the test subset {' '.join(tests)}: {known}")
    selection = _first(rest, SELECTION_NAMES) if len(rest) > 1 else ()
    return {name: TEST if name in tests else SELECTION if name in selection else TRAINING for name in names}


def _first(names: Sequence[str], wanted: Sequence[str]) -> tuple[str, ...]:
    """The names that are called like the first of `wanted` that is there, whatever their capitals."""
    found = (tuple(name for name in names if name.lower() == want) for want in wanted)
    return next(filter(None, found), ())
