"""A bundle: a detector as two plain files, config.json and model.safetensors.

The safetensors file carries no metadata (its order is not stable), so equal weights give equal
bytes; facts about the detector live in config.json.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as tensors_from_bytes
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor

from pbd_ray.config import DetectorConfig, UserError, first_problem, one_line
from pbd_ray.detector.detector import Detector
from pbd_ray.detector.whole_folder import whole_folder

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
FILES = (CONFIG_FILE, WEIGHTS_FILE)
FORMAT_VERSION = 1


class BundleError(UserError):
    """A bundle cannot be read or written. The message is one line for the user."""


@dataclass(frozen=True, eq=False)
class Bundle:
    """A detector in evaluation mode on the CPU, and what its config.json says."""

    detector: Detector
    config: DetectorConfig
    classes: tuple[str, ...]
    kept_blocks: tuple[int, ...]
    facts: dict[str, Any]


def bundle_files(detector: Detector, classes: Sequence[str], facts: Mapping[str, Any]) -> dict[str, bytes]:
    """The contents of a bundle's files under their names. Equal detectors give equal bytes.

    Raises:
        BundleError: class names do not match the detector, facts are not JSON, or the detector holds
            tensors a plain detector does not (LoRA that is not merged).
    """
    if len(classes) != detector.num_classes:
        raise BundleError(f"{len(classes)} class names for a detector of {detector.num_classes} classes")
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in detector.state_dict().items()}
    with torch.device("meta"):
        plain = Detector(detector.config, detector.num_classes, detector.kept_blocks).state_dict()
    _check_tensors("detector", state, plain)
    config = {
        "format_version": FORMAT_VERSION,
        "detector": detector.config.model_dump(mode="json"),
        "classes": list(classes),
        "kept_blocks": list(detector.kept_blocks),
        "facts": dict(facts),
    }
    try:
        text = json.dumps(config, indent=2, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise BundleError(f"facts of a bundle must be JSON: {error}") from None
    return {CONFIG_FILE: f"{text}\n".encode(), WEIGHTS_FILE: tensors_to_bytes(state)}


def bundle_from_files(files: Mapping[str, bytes], source: str = "bundle") -> Bundle:
    """The inverse of `bundle_files`; `source` names the bundle in errors.

    Raises:
        BundleError: anything missing, unreadable, of an unknown version or not matching.
    """
    for name in FILES:
        if name not in files:
            raise BundleError(f"{source}: {name} is missing")
    where = f"{source}/{CONFIG_FILE}"
    raw = _parse_config(files[CONFIG_FILE], where)
    try:
        config = DetectorConfig.model_validate(raw["detector"])
    except ValidationError as error:
        raise BundleError(f"{where}: {first_problem(error, 'detector'):.200}") from None
    try:
        with torch.random.fork_rng(devices=[]):  # building draws initial weights; loading must not
            detector = Detector(config, len(raw["classes"]), raw["kept_blocks"])
    except ValueError as error:
        raise BundleError(f"{where}: {error}") from None
    try:
        tensors = tensors_from_bytes(files[WEIGHTS_FILE])
    except SafetensorError as error:
        reason = one_line(error)
        raise BundleError(f"{source}/{WEIGHTS_FILE}: not a safetensors file: {reason}") from None
    _check_tensors(f"{source}/{WEIGHTS_FILE}", tensors, detector.state_dict())
    detector.load_state_dict(tensors)
    return Bundle(detector.eval(), config, tuple(raw["classes"]), detector.kept_blocks, raw["facts"])


def save_bundle(
    directory: str | Path, detector: Detector, classes: Sequence[str], facts: Mapping[str, Any]
) -> None:
    """Write a bundle directory: all of it or nothing. An older bundle there is replaced.

    Raises:
        BundleError: as of `bundle_files`, or the path holds something that is not a bundle.
    """
    directory = Path(directory)
    files = bundle_files(detector, classes, facts)
    if directory.exists() and not _replaceable(directory):
        raise BundleError(f"{directory}: exists and is not a bundle")
    try:
        with whole_folder(directory) as folder:
            for name, content in files.items():
                with (folder / name).open("wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
    except OSError as error:
        raise BundleError(f"{directory}: cannot be written: {error.strerror}") from None


def load_bundle(directory: str | Path) -> Bundle:
    """Read a bundle directory.

    Raises:
        BundleError: as of `bundle_from_files`.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise BundleError(f"{directory}: no such bundle directory")
    files = {}
    for name in FILES:
        try:
            files[name] = (directory / name).read_bytes()
        except FileNotFoundError:
            raise BundleError(f"{directory}: {name} is missing") from None
        except OSError as error:
            raise BundleError(f"{directory / name}: {error.strerror}") from None
    return bundle_from_files(files, str(directory))


def _replaceable(directory: Path) -> bool:
    return directory.is_dir() and {entry.name for entry in directory.iterdir()} <= set(FILES)


def _parse_config(content: bytes, where: str) -> dict[str, Any]:
    try:
        raw = json.loads(content)
    except ValueError as error:
        raise BundleError(f"{where}: not JSON: {error}") from None
    if not isinstance(raw, dict):
        raise BundleError(f"{where}: expected an object")
    if raw.get("format_version") != FORMAT_VERSION:
        raise BundleError(
            f"{where}: format_version {raw.get('format_version')!r} is unknown, "
            f"this release reads {FORMAT_VERSION}"
        )
    fields = {"format_version": int, "detector": dict, "classes": list, "kept_blocks": list, "facts": dict}
    for key, kind in fields.items():
        if not isinstance(raw.get(key), kind):
            raise BundleError(f"{where}: {key} is missing or not {kind.__name__}")
    unknown = sorted(set(raw) - set(fields))
    if unknown:
        raise BundleError(f"{where}: unknown key '{unknown[0]}'")
    for key, kind in (("classes", str), ("kept_blocks", int)):
        for value in raw[key]:
            if type(value) is not kind:
                raise BundleError(f"{where}: {key} holds {value!r}, expected {kind.__name__}")
    return raw


def _check_tensors(where: str, tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    missing, unknown = sorted(set(expected) - set(tensors)), sorted(set(tensors) - set(expected))
    factors = [name for name in unknown if ".lora_" in name]
    if factors:
        raise BundleError(
            f"{where}: tensor '{factors[0]}' is LoRA that is not merged ({len(factors)} in all)"
        )
    if missing:
        raise BundleError(f"{where}: tensor '{missing[0]}' is missing ({len(missing)} in all)")
    if unknown:
        raise BundleError(f"{where}: unexpected tensor '{unknown[0]}' ({len(unknown)} in all)")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            shapes = f"{list(tensor.shape)}, expected {list(expected[name].shape)}"
            raise BundleError(f"{where}: tensor '{name}' has shape {shapes}")
        if not tensor.is_floating_point():
            raise BundleError(f"{where}: tensor '{name}' has dtype {tensor.dtype}, expected floats")
        if not torch.isfinite(tensor).all():
            raise BundleError(f"{where}: tensor '{name}' has values that are not finite")
