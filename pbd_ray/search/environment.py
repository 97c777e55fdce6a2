"""What a run was computed with: the conditions under which a resumed run ends bit for bit the same."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import pbd_ray
from pbd_ray.config import Execution
from pbd_ray.search.hashing import bytes_hash, value_hash

PACKAGES = (
    "torch",
    "torchvision",
    "timm",
    "peft",
    "ray",
    "numpy",
    "pyarrow",
    "decord2",
    "av",
    "safetensors",
)


@dataclass(frozen=True)
class Environment:
    """Versions, machine and inputs of one start. Apart from `platform` every field decides exactness."""

    versions: Mapping[str, str]
    python: str
    platform: str
    cpu: str
    source_hash: str
    data_hash: str
    teacher_hash: str
    quarantine_hash: str
    device: str
    threads_per_worker: int
    train_workers: int
    window_batch: int
    candidate_batch: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def current_environment(
    execution: Execution, data_hash: str, teacher_hash: str, quarantine_hash: str
) -> Environment:
    """The environment of this process. Of a package that is not installed no version is listed."""
    return Environment(
        versions=_versions(),
        python=platform.python_version(),
        platform=platform.platform(),
        cpu=cpu_model(),
        source_hash=source_hash(),
        data_hash=data_hash,
        teacher_hash=teacher_hash,
        quarantine_hash=quarantine_hash,
        device=execution.device,
        threads_per_worker=execution.threads_per_worker,
        train_workers=execution.train_workers,
        window_batch=execution.window_batch,
        candidate_batch=execution.candidate_batch,
    )


def exactness_changes(first: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[str, ...]:
    """Lines `key: first -> now` for everything that decides exactness and differs between two starts."""
    before, after = _flat(first), _flat(now)
    keys = sorted((before.keys() | after.keys()) - {"platform"})
    return tuple(f"{k}: {before.get(k)} -> {after.get(k)}" for k in keys if before.get(k) != after.get(k))


def cpu_model() -> str:
    """The processor's name; its kernels, hence the last bits of a sum, depend on it."""
    listing = Path("/proc/cpuinfo")
    if listing.is_file():
        for line in listing.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def source_hash() -> str:
    """SHA-256 over the package's .py files, by their path inside it."""
    folder = Path(pbd_ray.__file__).parent
    sources = {file.relative_to(folder).as_posix(): file for file in folder.rglob("*.py")}
    return value_hash({name: bytes_hash(file.read_bytes()) for name, file in sources.items()})


def _versions() -> dict[str, str]:
    installed = {}
    for package in PACKAGES:
        try:
            installed[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return installed


def _flat(facts: Mapping[str, Any]) -> dict[str, Any]:
    flat = {key: value for key, value in facts.items() if key != "versions"}
    return flat | {f"versions.{name}": version for name, version in facts.get("versions", {}).items()}
