"""A folder of files that appears whole, or not at all."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def whole_folder(directory: Path) -> Iterator[Path]:
    """A new folder to fill; it takes the place of `directory` when the context ends without an error.

    After an error all is as before, parents that were made for it included.

    Raises:
        OSError: a folder cannot be made or moved.
    """
    missing = [parent for parent in directory.parents if not parent.exists()]
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{directory.name}.", dir=directory.parent) as scratch:
            new = Path(scratch, "new")
            new.mkdir()
            yield new
            _swap(new, directory, Path(scratch, "old"))
    except BaseException:
        with contextlib.suppress(OSError):  # somebody else uses it by now
            for parent in missing:
                parent.rmdir()
        raise


def _swap(new: Path, directory: Path, old: Path) -> None:
    if directory.exists():
        directory.rename(old)
    try:
        new.rename(directory)
    except OSError:
        if old.exists():
            old.rename(directory)
        raise
