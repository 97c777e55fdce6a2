"""Videos that nobody has annotated: files and folders as a user names them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pbd_ray.config import ConfigError
from pbd_ray.data.annotations import VIDEO_SUFFIXES, Video

FOLDER_SUFFIXES = (
    *VIDEO_SUFFIXES,
    *(".mov", ".m4v", ".mpg", ".mpeg", ".ts", ".m2ts", ".flv", ".wmv", ".3gp", ".ogv"),
)
"""What is taken for a video in a folder. A file that is named itself is tried whatever its suffix."""
SUBSET = "unannotated"
_LONGEST_ID = 60
"""Characters: with a suffix it fits a file name of 255 bytes in every script."""


@dataclass(frozen=True, eq=False)
class Unannotated:
    """Videos without instances, of unknown length, and the folder that holds all of their files."""

    root: str
    videos: tuple[Video, ...]


def find_videos(paths: Sequence[str]) -> Unannotated:
    """The videos that `paths` name: files in their order, of folders what lies in them at any depth, sorted.
    A file that is named twice is one video; hidden files and links to folders are not looked at.

    Ids are the file names without suffix, made safe as file names; of equal ones the later get a number.

    Raises:
        ConfigError: nothing is there, or a folder without a video.
    """
    files = tuple(dict.fromkeys(file for path in paths for file in _files(path)))
    # The links that lead to a folder are followed here, once, so that all of them have a common root.
    root = os.path.commonpath([file.parent for file in files])
    taken: set[str] = set()
    videos = [_video(file, _free_id(file.stem, taken)) for file in files]
    return Unannotated(root, tuple(videos))


def _files(path: str) -> Iterator[Path]:
    given = Path(path)
    if not given.is_dir():
        if not given.is_file():
            raise ConfigError(f"{path}: no such video file or folder")
        yield given.parent.resolve() / given.name
        return
    folder = given.resolve()
    found = sorted(
        file
        for file in folder.rglob("*")
        if file.suffix.lower() in FOLDER_SUFFIXES and not file.name.startswith(".") and file.is_file()
    )
    if not found:
        raise ConfigError(f"{path}: no video in this folder: no file ends in {', '.join(FOLDER_SUFFIXES)}")
    yield from found


def _free_id(stem: str, taken: set[str]) -> str:
    """An id that no other video has, also where file names do not tell capitals from small letters."""
    safe = re.sub(r"[^\w.-]+", "_", stem).strip(".-_")[:_LONGEST_ID] or "video"
    id_, number = safe, 1
    while id_.casefold() in taken:
        number += 1
        id_ = f"{safe}-{number}"
    taken.add(id_.casefold())
    return id_


def _video(file: Path, id_: str) -> Video:
    nothing = np.zeros((0, 2)), np.zeros(0, np.int32)
    return Video(id_, str(file), SUBSET, 0.0, 0.0, 0, *nothing)
