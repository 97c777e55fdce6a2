"""Videos that a run leaves out, for all candidates alike, because their files cannot be used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from pbd_ray.config import UserError
from pbd_ray.data.annotations import Annotations, Split


class QuarantineError(UserError):
    """Too many videos cannot be used. One line for the user."""


@dataclass(frozen=True)
class Quarantine:
    """Decided at a run's first start and never changed after."""

    reasons: Mapping[str, str]
    """Video id -> why it is left out, one line that names its file."""
    shares: Mapping[str, float]
    """Part of the split (fit, selection, test) -> share of its videos that is left out."""

    def without(self, split: Split) -> Split:
        """The split without the videos that are left out."""
        return Split(**{name: self._kept(part) for name, part in split.parts.items()})

    def _kept(self, part: Annotations) -> Annotations:
        return replace(part, videos=tuple(video for video in part.videos if video.id not in self.reasons))


NOTHING = Quarantine({}, {})
"""Where every video can be used, as those of the embedded data set."""


def quarantine(split: Split, problems: Mapping[str, str], most: float) -> Quarantine:
    """Leave out the videos that have a problem.

    Args:
        problems: video id -> why it cannot be used.
        most: the share of a part that may be left out, `experiment.data.max_quarantined`.

    Raises:
        QuarantineError: more than that of a part, or all of it, would go.
    """
    if not problems:
        return NOTHING
    shares = {}
    for name, part in split.parts.items():
        bad = [video.id for video in part.videos if video.id in problems]
        shares[name] = len(bad) / len(part.videos) if bad else 0.0
        if not bad:
            continue
        count = f"{len(bad)} of {len(part.videos)} {name} videos ({shares[name]:.1%}) cannot be used"
        first = f"the first is {problems[bad[0]]}"
        if shares[name] > most:
            raise QuarantineError(f"{count}, over experiment.data.max_quarantined={most:g}; {first}")
        if len(bad) == len(part.videos):
            raise QuarantineError(f"{count}: none is left; {first}")
    return Quarantine({id_: problems[id_] for id_ in sorted(problems)}, shares)


def quarantine_to_json(value: Quarantine) -> dict[str, Any]:
    """`videos`: id -> reason; `shares`: part -> share of its videos."""
    return {"videos": dict(value.reasons), "shares": dict(value.shares)}


def quarantine_from_json(value: Any) -> Quarantine:
    """The inverse.

    Raises:
        ValueError: the value is something else.
    """
    if not isinstance(value, dict) or value.keys() != {"videos", "shares"}:
        raise ValueError("expected an object of 'videos' and 'shares'")
    if not all(isinstance(part, dict) for part in value.values()):
        raise ValueError("expected an object of objects")
    if not all(isinstance(reason, str) for reason in value["videos"].values()):
        raise ValueError("expected a text as every reason")
    return Quarantine(value["videos"], value["shares"])
