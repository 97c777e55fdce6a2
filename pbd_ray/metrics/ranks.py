"""How far two orders agree."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def kendall_tau(first: Sequence[float], second: Sequence[float]) -> float:
    """Kendall's tau-b of two scores of the same things (Kendall 1945): 1 for the same order, -1 for the
    reverse; ties in one of them are no disagreement. nan where one is constant, or of fewer than two."""
    signs = [np.sign(np.subtract.outer(values, values)) for values in (np.array(first), np.array(second))]
    pairs = [float((one * one).sum()) for one in signs]
    return float((signs[0] * signs[1]).sum() / np.sqrt(pairs[0] * pairs[1])) if all(pairs) else float("nan")
