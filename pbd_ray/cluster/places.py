"""Before anything long runs: do the places that a run writes to hold it, and do all nodes see them?

Only nodes that are there at the start are asked. A node that comes later refuses a missing `data_root` when
its first worker starts; a run directory that it cannot reach ends the fine-tuning run that is placed there.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pbd_ray.cluster.monitoring import say
from pbd_ray.cluster.session import holds, worker_resources
from pbd_ray.config import Recipe, RunError, UserError, one_line
from pbd_ray.data.cache import FrameCache, free_bytes
from pbd_ray.data.source import frame_cache
from pbd_ray.search.storage import TEMPORARY, Storage

_ANSWER_SECONDS = 120.0
"""More than the storage's own patience takes."""


class PlaceError(UserError):
    """A place is too small, or not shared by all nodes. One line for the user."""


@dataclass(frozen=True)
class _Look:
    """What one node sees."""

    cannot: str | None
    """What it cannot do with the run directory, and why."""
    shortfall_bytes: int
    """How much its disk lacks of the cache's budget."""


def check_places(recipe: Recipe, storage: Storage, needed_bytes: int) -> None:
    """Refuse a run directory that is too small or that some node cannot use; say where caches are cut short.

    Args:
        needed_bytes: what the run writes at most, from its beginning to its end.

    Raises:
        PlaceError: one line that says which place, and on which node.
    """
    _require_room(storage, needed_bytes)
    cache = frame_cache(recipe)
    nodes = [] if recipe.execution.backend == "local" else [node for node in ray.nodes() if node["Alive"]]
    if len(nodes) < 2:
        _tell(recipe, cache, "this node", 0 if cache is None else cache.shortfall_bytes())
        return
    marker, content = f"preflight{TEMPORARY}{uuid.uuid4().hex}", uuid.uuid4().bytes
    storage.write(marker, content)
    try:
        able = [node for node in nodes if holds(node, worker_resources(recipe.execution))]
        looks = _ask(able, storage.location, marker, content, cache)
        for name, look in looks.items():
            if look.cannot is not None:
                raise PlaceError(f"run_dir {storage.location} is not shared: node {name} {look.cannot}")
            _tell(recipe, cache, f"node {name}", look.shortfall_bytes)
    finally:
        storage.sweep(recursive=False)  # the marker, and each node's answer to it
        storage.remove_empty_root()


def _require_room(storage: Storage, needed_bytes: int) -> None:
    if not storage.exclusive:
        return
    root = Path(storage.root)
    written = sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
    missing, free = needed_bytes - written, free_bytes(root)
    if missing > free:
        raise PlaceError(
            f"run_dir {root}: the run writes up to {missing / 1e9:.3g} GB more, "
            f"and {free / 1e9:.3g} GB are free"
        )


def _ask(
    nodes: list[dict[str, Any]], location: str, marker: str, content: bytes, cache: FrameCache | None
) -> dict[str, _Look]:
    """What each node sees, by its name."""
    task: Any = ray.remote(_look)
    asked = {}
    for node in nodes:
        there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        options = task.options(num_cpus=0, max_retries=0, scheduling_strategy=there)
        name = f"{node['NodeManagerAddress']} ({node['NodeID'][:8]})"
        asked[options.remote(location, marker, content, cache)] = name
    ready, silent = ray.wait(list(asked), num_returns=len(asked), timeout=_ANSWER_SECONDS)
    looks = {asked[one]: _Look(f"has not answered within {_ANSWER_SECONDS:g} s", 0) for one in silent}
    for one in ready:
        try:
            looks[asked[one]] = ray.get(one)
        except RayTaskError:
            raise
        except RayError as error:  # it went away: no worker will be placed there
            say(f"node {asked[one]} cannot be asked: {one_line(error)[:200]}")
    return looks


def _look(location: str, marker: str, content: bytes, cache: FrameCache | None) -> _Look:
    """Runs on the node: read what the driver wrote, and write beside it."""
    shortfall = 0 if cache is None else cache.shortfall_bytes()
    doing = "read"
    try:
        storage = Storage.at(location)
        if storage.read(marker) != content:
            return _Look(f"reads something else in {storage.uri(marker)}", shortfall)
        doing = "write"
        storage.write(f"{marker}-{uuid.uuid4().hex}", content)
    except (UserError, RunError, OSError) as error:
        return _Look(f"cannot {doing} there: {one_line(error)}", shortfall)
    return _Look(None, shortfall)


def _tell(recipe: Recipe, cache: FrameCache | None, where: str, shortfall_bytes: int) -> None:
    if cache is not None and shortfall_bytes:
        lacking, asked = shortfall_bytes / 1e9, recipe.execution.cache_gigabytes
        say(
            f"cache_dir {cache.directory.parent}: {where} lacks {lacking:.3g} GB of "
            f"execution.cache_gigabytes={asked:g}: fewer decoded frames are kept there"
        )
