"""Which depth of a run meets a budget: looked up in what is known, nothing is computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pbd_ray.config import ConfigError
from pbd_ray.report.rounds import DepthInfo

SHARES = {"latency": "latency_ratio", "macs": "macs_ratio", "params": "params_ratio"}
"""Limit -> field of DepthInfo: a share of the teacher's."""
LIMITS = (*SHARES, "map_loss")


@dataclass(frozen=True)
class Pick:
    """The depth that is named, and why."""

    depth: DepthInfo
    reason: str


def limits_of(texts: Sequence[str]) -> dict[str, float]:
    """Limits from `latency=0.8` and the like.

    Raises:
        ConfigError: not of that form, another name, a name twice, or a number that is no limit.
    """
    found: dict[str, float] = {}
    for text in texts:
        name, _, number = text.partition("=")
        if name not in LIMITS or name in found:
            what = "is given twice" if name in found else f"is not one of {', '.join(LIMITS)}"
            raise ConfigError(f"--pick {text}: '{name}' {what}")
        try:
            value = float(number)
        except ValueError:
            raise ConfigError(f"--pick {text}: '{number}' is not a number") from None
        if not (value >= 0 if name == "map_loss" else 0 < value <= 1):
            wanted = "at least 0" if name == "map_loss" else "a share of the teacher's in (0, 1]"
            raise ConfigError(f"--pick {text}: {number} is not {wanted}")
        found[name] = value
    return found


def pick(depths: Sequence[DepthInfo], limits: Mapping[str, float]) -> Pick:
    """The least that has to be dropped to meet every limit; with `map_loss` the most that may be.

    Only `map_loss`, the headline mAP below the teacher's at most, looks at the test videos.

    Args:
        depths: the teacher and every round that stands.

    Raises:
        ConfigError: no depth meets them all.
    """
    fits = [depth for depth in depths if _meets(depth, depths[0], limits)]
    asked = ", ".join(f"{name} at most {value:g}" for name, value in limits.items())
    if not fits:
        closest = ", ".join(
            f"{depth.blocks} blocks have {_standing(depth, depths[0], limits)}" for depth in depths[1:][-2:]
        )
        raise ConfigError(f"--pick: no depth has {asked}: {closest or 'no round stands'}")
    most = "map_loss" in limits
    chosen = min(fits, key=lambda depth: depth.blocks if most else -depth.blocks)
    extreme = "the most drops" if most else "the fewest drops"
    return Pick(chosen, f"{extreme} with {asked}: {_standing(chosen, depths[0], limits)}")


def _meets(depth: DepthInfo, teacher: DepthInfo, limits: Mapping[str, float]) -> bool:
    return all(_value(depth, teacher, name) <= limit for name, limit in limits.items())


def _standing(depth: DepthInfo, teacher: DepthInfo, limits: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {_value(depth, teacher, name):.4f}" for name in limits)


def _value(depth: DepthInfo, teacher: DepthInfo, name: str) -> float:
    if name == "map_loss":
        return teacher.headline_map - depth.headline_map
    return float(getattr(depth, SHARES[name]))
