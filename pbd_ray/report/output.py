"""A directory of results: `--output DIR`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from pbd_ray.config import ConfigError


def write_files(output: str | Path, files: Mapping[str, bytes]) -> None:
    """Write files into a directory, made if need be; every one appears whole.

    Raises:
        ConfigError: the directory cannot be made or written.
    """
    folder = Path(output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            temporary = folder / f".{name}.{os.getpid()}"
            temporary.write_bytes(content)
            temporary.replace(folder / name)
    except OSError as error:
        raise ConfigError(f"--output {output}: cannot be written: {error.strerror}") from None
