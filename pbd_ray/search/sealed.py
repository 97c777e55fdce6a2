"""The files of a committed round, as they were committed."""

from __future__ import annotations

from collections.abc import Mapping

from pbd_ray.search.hashing import bytes_hash
from pbd_ray.search.storage import LedgerError, Storage


class Sealed(Storage):
    """Reads of one folder see the files that its commit lists, whole and unaltered, or fail.

    A file that was lost or altered would otherwise show as another mAP, or as another round after it.

    Args:
        folder: of the round, relative to the storage's root.
        files: SHA-256 by name inside the folder.
    """

    def __init__(self, storage: Storage, folder: str, files: Mapping[str, str]) -> None:
        super().__init__(storage.filesystem, storage.root, storage.location)
        self._commit = storage.uri(f"{folder}/commit.json")
        self._files = {f"{folder}/{name}": digest for name, digest in files.items()}

    def names(self, folder: str = "", recursive: bool = True) -> tuple[str, ...]:
        """The committed files below a folder, sorted."""
        assert recursive, "folders of a round are listed whole"
        return tuple(sorted(name for name in self._files if name.startswith(f"{folder}/")))

    def exists(self, name: str) -> bool:
        return name in self._files

    def read(self, name: str) -> bytes:
        """The content of a file as it was committed.

        Raises:
            LedgerError: it is lost or altered.
        """
        try:
            content = super().read(name)
        except FileNotFoundError:
            raise LedgerError(f"{self.uri(name)} is missing, though {self._commit} lists it") from None
        if bytes_hash(content) != self._files[name]:
            raise LedgerError(f"{self.uri(name)}: bytes differ from those that {self._commit} lists")
        return content
