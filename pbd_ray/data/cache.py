"""Decoded frames on the node's disk, memory-mapped: what every epoch, learning rate and round reads again.

One .npy file a video and size, holding the frames that the grid can ever ask for. The cache never
evicts: epochs read videos in cycles, where keeping the first that fit beats throwing out the oldest. It ends
where its budget ends, or before, where the disk does.
Files are written under a temporary name and renamed, so processes and threads of a node share them safely.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pbd_ray.data.video import FrameReader

_CHUNK_FRAMES = 256
_PART = ".part"
_ABANDONED_SECONDS = 3600.0
"""A process that still fills a file has written to it since."""
SPARE_BYTES = 500_000_000
"""Of the disk, left to others: a memory-mapped file that outgrows its disk kills the process."""


@dataclass(frozen=True)
class FrameCache:
    """A directory of decoded frames with a byte budget."""

    directory: Path
    budget_bytes: int

    def open(
        self, path: str, short_side: int, wanted: npt.NDArray[np.int64], annotated_frames: int
    ) -> CachedFrames | FrameReader:
        """The frames `wanted` of a file, decoded on first use; a reader of the file where the budget holds no
        more.

        Args:
            wanted: all frame indices that will ever be asked for, ascending.
            annotated_frames: the frame count the indices were computed from.

        Raises:
            VideoError: the file, or a frame of it, cannot be read, or it is not the annotated one.
        """
        file = self.directory / f"{_key(path, short_side, wanted)}.npy"
        if not file.exists():
            reader = FrameReader(path, short_side)
            reader.check_frames(annotated_frames)
            if not self._fill(file, reader, wanted):
                return reader
        return CachedFrames(wanted, np.load(file, mmap_mode="r", allow_pickle=False))

    def shortfall_bytes(self) -> int:
        """By how much the disk is too small for what is left of the budget; 0 where it is not."""
        used = self._used_bytes() if self.directory.is_dir() else 0
        return max(0, self.budget_bytes - used - (free_bytes(self.directory) - SPARE_BYTES))

    def _fill(self, file: Path, reader: FrameReader, wanted: npt.NDArray[np.int64]) -> bool:
        first = reader.read(wanted[:1])
        shape = (len(wanted), *first.shape[1:])
        self.directory.mkdir(parents=True, exist_ok=True)
        size = int(np.prod(shape))
        if self._used_bytes() + size > self.budget_bytes or size > free_bytes(self.directory) - SPARE_BYTES:
            return False
        part = file.with_suffix(f".{os.getpid()}-{threading.get_ident()}{_PART}")
        try:
            frames = np.lib.format.open_memmap(part, mode="w+", dtype=np.uint8, shape=shape)
            for start in range(0, len(wanted), _CHUNK_FRAMES):
                frames[start : start + _CHUNK_FRAMES] = reader.read(wanted[start : start + _CHUNK_FRAMES])
                os.utime(part)  # what is written through a map dates the file only when it gets to the disk
            frames.flush()
            part.replace(file)
        finally:
            part.unlink(missing_ok=True)
        return True

    def _used_bytes(self) -> int:
        """Of all files; what killed processes have left half-written is removed."""
        used, now = 0, time.time()
        for entry in os.scandir(self.directory):
            with contextlib.suppress(FileNotFoundError):  # another process has just renamed its part
                stat = entry.stat()
                if entry.name.endswith(_PART) and now - stat.st_mtime > _ABANDONED_SECONDS:
                    Path(entry.path).unlink()
                else:
                    used += stat.st_size
        return used


@dataclass(frozen=True, eq=False)
class CachedFrames:
    """The cached frames of one file; reads like a `FrameReader`."""

    wanted: npt.NDArray[np.int64]
    frames: npt.NDArray[np.uint8]

    def read(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
        """Frames `indices`, all among `wanted`, in any order and with repeats, as (T, H, W, 3) RGB."""
        assert np.isin(indices, self.wanted).all(), "a frame that was not among the wanted ones"
        return self.frames[np.searchsorted(self.wanted, indices)]


def free_bytes(path: Path) -> int:
    """Free space on the disk where a path is, or would be made."""
    there = next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
    return shutil.disk_usage(there).free


def _key(path: str, short_side: int, wanted: npt.NDArray[np.int64]) -> str:
    """Changes with the file (name, size, time of change), the size and the frames."""
    stat = Path(path).stat()
    text = f"{Path(path).absolute()}|{stat.st_size}|{stat.st_mtime_ns}|{short_side}|"
    return hashlib.sha256(text.encode() + wanted.tobytes()).hexdigest()[:32]
