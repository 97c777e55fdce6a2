"""Where Ray Tune and Ray Train keep the files of the open round."""

from __future__ import annotations

from typing import Any

from pbd_ray.search.storage import Storage


def ray_storage(location: str) -> dict[str, Any]:
    """Keywords of Tune's and Train's RunConfig for files at a path or URI.

    From a URI Ray would open a client that tries for minutes where nothing answers. Ours, in other
    processes, keeps its bounds on a request and has the three tries that pyarrow gives to a copy.

    Raises:
        UserError, RunError: as `Storage.at`.
    """
    if "://" not in location:
        return {"storage_path": location}
    place = Storage.at(location)
    return {"storage_path": place.root, "storage_filesystem": place.filesystem}
