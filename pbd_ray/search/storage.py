"""Files of a run directory on a local disk or an object store, through pyarrow.fs.

Every write is atomic: a reader sees the old content, the new content, or no file. On a file system the
content goes to a temporary neighbour that is moved into place; an object store's single upload is atomic.
Operations that fail are tried again as `patience` says; all of them may be repeated.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import uuid
from collections.abc import Mapping
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from pbd_ray.config import UserError, one_line
from pbd_ray.search.patience import patiently

TEMPORARY = ".tmp-"
"""In the name of every half-written file; such files count for nothing and are swept on open."""

CONNECT_SECONDS = 5.0
SILENCE_SECONDS = 10.0
"""An object store that sends and takes nothing for so long counts as failed."""

_OBJECT_STORES = ("s3", "gcs", "abfs")
_SECRET = re.compile(r"[^:/]+://[^/@]*:[^/@]*@")


class LedgerError(UserError):
    """The run directory cannot be used as asked. The message is one line for the user."""


class Storage:
    """Named files under one root. Names are relative and use '/'."""

    def __init__(self, filesystem: fs.FileSystem, root: str, location: str | None = None) -> None:
        self.filesystem = filesystem
        self.root = root.rstrip("/")
        self.location = self.root if location is None else location
        """As the user wrote it, local paths made absolute."""
        self._single_put = filesystem.type_name in _OBJECT_STORES

    @classmethod
    def at(cls, location: str) -> Storage:
        """Storage at a local path (relative paths too) or a file://, s3://, gs:// URI.

        Raises:
            LedgerError: the location is not one pyarrow knows, is a file, or its bucket does not exist.
            StorageDenied, StorageError: it cannot be reached.
        """
        if "://" in location:
            filesystem, root = _from_uri(location)
        else:
            location = root = os.path.abspath(os.path.expanduser(location))
            filesystem = fs.LocalFileSystem()
        if not root.strip("/"):
            raise LedgerError(f"run_dir '{location}' names no directory")
        storage = cls(filesystem, root, location)
        bucket = root.partition("/")[0]
        if storage._single_put and storage._kind(bucket) == fs.FileType.NotFound:
            raise LedgerError(f"run_dir '{location}': there is no bucket '{bucket}'")
        if storage._kind(root) == fs.FileType.File:
            raise LedgerError(f"run_dir '{location}' is a file, not a directory")
        return storage

    def uri(self, name: str) -> str:
        """Path or URI of a name, for those who open it themselves."""
        path, mark, query = self.location.partition("?")
        return f"{path.rstrip('/')}/{name}{mark}{query}"

    def names(self, folder: str = "", recursive: bool = True) -> tuple[str, ...]:
        """All whole files below a folder, sorted; temporary leftovers are left out."""
        return tuple(name for name in self._all_names(folder, recursive) if TEMPORARY not in name)

    def exists(self, name: str) -> bool:
        return bool(self._kind(self._path(name)) == fs.FileType.File)

    def read(self, name: str) -> bytes:
        """The content of a file.

        Raises:
            FileNotFoundError: there is none of that name.
        """

        def get() -> bytes:
            with self.filesystem.open_input_stream(self._path(name), compression=None) as stream:
                return bytes(stream.read())

        return patiently(get, f"read {self.uri(name)}")

    def write(self, name: str, content: bytes) -> None:
        """Write a file atomically, over an older one of that name if there is one."""
        path = self._path(name)

        def put() -> None:
            if self._single_put:
                self._put(path, content)
                return
            self.filesystem.create_dir(path.rpartition("/")[0], recursive=True)
            temporary = f"{path}{TEMPORARY}{uuid.uuid4().hex}"
            try:
                self._put(temporary, content)
                self.filesystem.move(temporary, path)
            except OSError:
                with contextlib.suppress(OSError):  # on a full disk it holds the last room there is
                    self.filesystem.delete_file(temporary)
                raise

        patiently(put, f"write {self.uri(name)}")

    @property
    def exclusive(self) -> bool:
        """Whether `create` lets one caller through whatever the others do."""
        return bool(self.filesystem.type_name == "local")

    def create(self, name: str, content: bytes) -> bool:
        """Write a file unless there is one of that name; whether it was written.

        Where the storage is `exclusive` one of any number of callers succeeds. pyarrow has no such call
        for object stores: there it is a look and then a write, and of two within that moment the later wins.
        """
        if not self.exclusive:
            if self.exists(name):
                return False
            self.write(name, content)
            return True
        return _create_exclusively(Path(self._path(name)), content)

    def make_root(self) -> None:
        """Make the root directory; an object store needs none."""
        if self.exclusive:
            Path(self.root).mkdir(parents=True, exist_ok=True)

    def place(self) -> tuple[str, int | None]:
        """Where the root lies: its real path, and its inode number where it is a directory on a disk.

        A copy has another path and another number; the same directory mounted elsewhere has the same number.
        """
        if not self.exclusive:
            return self.root, None
        return os.path.realpath(self.root), Path(self.root).stat().st_ino

    def read_json(self, name: str) -> Any:
        """The value of a JSON file, or None where there is no such file.

        Raises:
            LedgerError: the file is not JSON.
        """
        if not self.exists(name):
            return None
        try:
            return json.loads(self.read(name))
        except ValueError as error:
            raise LedgerError(f"{self.uri(name)}: not valid JSON: {one_line(error)}") from None

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON value; NaN and infinities, which JSON cannot say, are refused."""
        self.write(name, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())

    def read_table(self, name: str) -> pa.Table:
        """The table of a Parquet file.

        Raises:
            LedgerError: the file is not Parquet, or a page of it is not what was written.
        """
        content = pa.BufferReader(self.read(name))
        try:
            # In this thread: one of Arrow's own may still hold a Python file when the interpreter ends, and
            # then the process aborts.
            return pq.ParquetFile(content, page_checksum_verification=True).read(use_threads=False)
        except (pa.ArrowException, OSError) as error:
            raise LedgerError(f"{self.uri(name)}: not valid Parquet: {one_line(error)}") from None

    def write_table(self, name: str, table: pa.Table, facts: Mapping[str, str] | None = None) -> None:
        """Write a Parquet file whose schema metadata is `facts` and nothing else."""
        buffer = io.BytesIO()
        plain = table.replace_schema_metadata(dict(facts) if facts else None)
        pq.write_table(plain, buffer, write_page_checksum=True)
        self.write(name, buffer.getvalue())

    def remove_folder(self, folder: str) -> None:
        """Delete a folder and all in it; nothing happens where there is none."""
        path = self._path(folder)

        def remove() -> None:
            if self.filesystem.get_file_info(path).type == fs.FileType.Directory:
                self.filesystem.delete_dir(path)

        patiently(remove, f"delete {self.uri(folder)}")

    def remove_empty_root(self) -> None:
        """Delete the root directory if nothing is in it; an object store has no empty directories."""
        if self.exclusive:
            with contextlib.suppress(OSError):  # not empty, or not there
                Path(self.root).rmdir()

    def sweep(self, folder: str = "", recursive: bool = True) -> None:
        """Delete the half-written files a killed driver left below a folder."""
        for name in self._all_names(folder, recursive):
            if TEMPORARY in name.rpartition("/")[2]:
                with contextlib.suppress(FileNotFoundError):  # deleted, though the answer was lost
                    patiently(partial(self.filesystem.delete_file, self._path(name)), f"delete {name}")

    def _put(self, path: str, content: bytes) -> None:
        with self.filesystem.open_output_stream(path, compression=None) as stream:
            stream.write(content)

    def _kind(self, path: str) -> Any:
        return patiently(lambda: self.filesystem.get_file_info(path).type, f"look up {path}")

    def _path(self, name: str) -> str:
        return f"{self.root}/{name}" if name else self.root

    def _all_names(self, folder: str, recursive: bool) -> list[str]:
        selector = fs.FileSelector(self._path(folder), recursive=recursive, allow_not_found=True)
        found = patiently(lambda: self.filesystem.get_file_info(selector), f"list {self.uri(folder)}")
        return sorted(info.path[len(self.root) + 1 :] for info in found if info.type == fs.FileType.File)


def _create_exclusively(path: Path, content: bytes) -> bool:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}{TEMPORARY}{uuid.uuid4().hex}")
    try:
        temporary.write_bytes(content)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    try:
        os.link(temporary, path)  # unlike a move it fails where the name is taken
    except FileExistsError:
        return False
    except OSError:  # a file system without links: readers may see the file before its content
        return _create_in_place(path, content)
    finally:
        temporary.unlink(missing_ok=True)
    return True


def _create_in_place(path: Path, content: bytes) -> bool:
    try:
        with path.open("xb") as stream:
            stream.write(content)
    except FileExistsError:
        return False
    return True


def _from_uri(location: str) -> tuple[fs.FileSystem, str]:
    """File system and path of a URI, with bounds on what a request may take and no retries of its own.

    Raises:
        LedgerError: pyarrow does not know the URI, or it holds a secret, which logs and files would show.
    """
    if _SECRET.match(location):
        raise LedgerError("run_dir: credentials belong in the environment, not in the URI")
    try:
        filesystem, root = fs.FileSystem.from_uri(location)
    except (pa.ArrowException, OSError) as error:
        raise LedgerError(f"run_dir '{location}': {one_line(error)}") from None
    limits: dict[str, Any] = {}
    if filesystem.type_name == "s3":
        limits["connect_timeout"], limits["request_timeout"] = CONNECT_SECONDS, SILENCE_SECONDS
        limits["retry_strategy"] = fs.AwsStandardS3RetryStrategy(max_attempts=1)
    elif filesystem.type_name == "gcs":
        limits["retry_time_limit"] = timedelta(seconds=SILENCE_SECONDS)
    if limits:
        # A URI cannot say these; what it did say is in the options that a file system is copied with.
        _, (options,) = filesystem.__reduce__()
        filesystem = type(filesystem)(**(options | limits))
    return filesystem, root
