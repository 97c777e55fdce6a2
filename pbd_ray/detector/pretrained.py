"""Reading weight files from elsewhere, and accounting for every key of them.

Every key is loaded, or ignored with a reason, or an error. Nothing is half-loaded: all is checked
before the first tensor is written.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.serialization import safe_globals

from pbd_ray.config import UserError, one_line

Tensors = Mapping[str, Tensor]

_EMA = "state_dict_ema"
_STATES = (_EMA, "state_dict", "model", "module")
"""Where checkpoints keep their tensors: OpenTAD, mmaction2 and timm; VideoMAE and DeepSpeed."""


class PretrainedError(UserError):
    """A weight file does not fit. The message is one line for the user."""


@dataclass(frozen=True)
class ImportReport:
    """What became of every key of a weight file."""

    source: str
    loaded: tuple[str, ...]
    """Keys of the file, sorted."""
    ignored: dict[str, str]
    """Key of the file -> why it is not needed."""

    def text(self) -> str:
        """One line: how many tensors were loaded, and how many were ignored for which reason."""
        reasons = Counter(self.ignored.values())
        ignored = "".join(f"; {count} ignored: {reason}" for reason, count in sorted(reasons.items()))
        return f"{self.source}: {len(self.loaded)} tensors loaded{ignored}"


@dataclass(frozen=True)
class WeightFile:
    """Tensors under the names of the file, and what the file says about its model."""

    source: str
    """Names the file in messages."""
    tensors: Tensors
    facts: Mapping[str, Any] = field(default_factory=dict)
    """The model's config as transformers or timm write it; empty where there is none."""


@dataclass
class Import:
    """The keys of a file on their way into a model: collect first, then check, then write."""

    source: str
    tensors: Tensors
    values: dict[str, Tensor] = field(default_factory=dict)
    """Our state_dict key -> value."""
    used: set[str] = field(default_factory=set)
    ignored: dict[str, str] = field(default_factory=dict)

    def take(self, key: str, *shape: int) -> Tensor:
        """A tensor of the file as float32.

        Raises:
            PretrainedError: the file has none of that name, or (where `shape` is given) of that shape.
        """
        if key not in self.tensors:
            raise PretrainedError(f"{self.source}: tensor '{key}' is missing")
        found = tuple(self.tensors[key].shape)
        if shape and found != shape:
            raise PretrainedError(
                f"{self.source}: tensor '{key}' has shape {list(found)}, the detector needs {list(shape)}"
            )
        self.used.add(key)
        return self.tensors[key].float()

    def ignore(self, key: str, reason: str) -> None:
        """Nothing happens if the file has no such key or it is accounted for already."""
        if key in self.tensors and key not in self.used:
            self.ignored.setdefault(key, reason)

    def unknown(self) -> list[str]:
        """Keys of the file that nothing accounts for so far, sorted."""
        return sorted(set(self.tensors) - self.used - set(self.ignored))

    def write(self, model: nn.Module, left: Collection[str] = ()) -> ImportReport:
        """Check that file and model are covered, shape for shape, then copy.

        Args:
            left: state_dict keys that stay as they are.

        Raises:
            PretrainedError: a key nobody asked for, another shape, or values that are not finite.
        """
        unknown = self.unknown()
        if unknown:
            raise PretrainedError(f"{self.source}: unknown tensor '{unknown[0]}' ({len(unknown)} in all)")
        state = model.state_dict()
        assert set(self.values) | set(left) == set(state), set(self.values) ^ set(state)
        for name, value in self.values.items():
            if value.shape != state[name].shape:
                raise PretrainedError(
                    f"{self.source}: tensor for '{name}' has shape {list(value.shape)}, "
                    f"the detector needs {list(state[name].shape)}"
                )
            if not torch.isfinite(value).all():
                raise PretrainedError(f"{self.source}: tensor for '{name}' has values that are not finite")
        with torch.no_grad():
            for name, value in self.values.items():
                state[name].copy_(value)
        return ImportReport(self.source, tuple(sorted(self.used)), dict(sorted(self.ignored.items())))


Source = str | Path | Tensors | WeightFile


def read_weights(source: Source, *, ema: bool = True) -> WeightFile:
    """Read a .safetensors file or a PyTorch checkpoint; pickled code is never run.

    The config of the model is looked for in the safetensors metadata (`config`) and in a `config.json`
    beside the file, as the Hugging Face hub lays them out.

    Args:
        source: the file, or what has been read already.
        ema: take a checkpoint's EMA weights where it has them.

    Raises:
        PretrainedError: a file that cannot be read, or that holds no tensors.
    """
    if isinstance(source, WeightFile):
        return source
    if isinstance(source, Mapping):
        return WeightFile("tensors", dict(source))
    path = Path(source)
    if not path.is_file():
        raise PretrainedError(f"{path}: no such file")
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (it is no dict)
                metadata = file.metadata() or {}
        except SafetensorError as error:
            raise PretrainedError(f"{path}: not a safetensors file: {_one_line(error)}") from None
        return WeightFile(str(path), tensors, _parsed(metadata.get("config")) or _config_beside(path))
    return WeightFile(str(path), _read_checkpoint(path, ema), _config_beside(path))


def _read_checkpoint(path: Path, ema: bool) -> dict[str, Tensor]:
    try:
        # VideoMAE's checkpoints keep their command line, a Namespace: plain attributes, no code.
        with safe_globals([argparse.Namespace]):
            content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen types for a file it cannot or must not read
        pickled = re.search(r"GLOBAL (\S+) was not an allowed", str(error))
        reason = f"pickled {pickled[1]} in it; save its state_dict alone" if pickled else _one_line(error)
        raise PretrainedError(f"{path}: cannot be read as weights only: {reason}") from None
    for key in _STATES:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping) and (ema or key != _EMA):
            content = content[key]
            break
    tensors = isinstance(content, Mapping) and all(isinstance(v, Tensor) for v in content.values())
    if not tensors or not content:
        raise PretrainedError(f"{path}: expected a mapping of names to tensors")
    return {str(key): value for key, value in content.items()}


def _config_beside(path: Path) -> dict[str, Any]:
    try:
        config = _parsed(path.with_name("config.json").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        return {}
    # Any program may have left a config.json there: only transformers' and timm's speak of a ViT.
    return config if {"num_attention_heads", "architecture"} & config.keys() else {}


def _parsed(text: str | None) -> dict[str, Any]:
    try:
        config = json.loads(text or "{}")
    except ValueError:
        return {}
    return config if isinstance(config, dict) else {}


def _one_line(error: Exception) -> str:
    return one_line(error)[:200]
