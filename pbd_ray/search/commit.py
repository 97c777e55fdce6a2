"""What commit.json says, and how a round's result is chained to the rounds before it. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pbd_ray.search.hashing import value_hash

COMMIT_KEYS = {"round", "epoch", "parent", "result", "parts", "files"}
NOT_CHAINED = "result is not the hash of its parts"


def is_commit(value: Any) -> bool:
    """Whether a JSON value has the shape of a commit."""
    tables = ("parts", "files")
    return (
        isinstance(value, dict)
        and value.keys() >= COMMIT_KEYS
        and all(isinstance(value[name], dict) for name in tables)
    )


def is_chained(round: int, commit: Mapping[str, Any]) -> bool:
    """Whether a commit's `result` follows from the rest of it."""
    return bool(commit["result"] == result_hash(round, commit["parent"], commit["parts"]))


def result_hash(round: int, parent: str, parts: Mapping[str, str]) -> str:
    """A round's `result`: its content chained to the rounds before it."""
    return value_hash({"round": round, "parent": parent, "parts": dict(parts)})
