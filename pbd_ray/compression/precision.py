"""The precision of forwards: one setting for training, scoring, evaluation and latency."""

from __future__ import annotations

import contextlib
from typing import Any, Literal

import torch

Autocast = Literal["none", "float16", "bfloat16"]


def autocast_context(kind: Autocast, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """The context a forward runs in."""
    if kind == "none":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.float16 if kind == "float16" else torch.bfloat16)
