"""What a DETAD analysis measures with: thresholds, and the buckets that instances are put in.

THUMOS14 and ActivityNet as their authors' analysis has them; for any other data set a YAML file such as

    tious: [0.5]
    bins:
      length: {edges: [0, 2, 5, .inf], labels: [S, M, L]}
      num-instances: {edges: [-1, 1, 10, .inf], labels: [one, some, many]}
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import yaml
from pydantic import Field, ValidationError, model_validator

from pbd_ray.config import ConfigError, Count, Fraction, Section, one_line

Characteristic = Literal["coverage", "length", "num-instances"]
"""Of an instance: its length over its video's, its length in seconds, instances of its class in its video."""


class Bins(Section):
    """Bucket i holds values in (edges[i], edges[i + 1]]; the first one holds edges[0] too."""

    edges: tuple[Annotated[float, Field(allow_inf_nan=True)], ...]
    labels: tuple[str, ...]

    @model_validator(mode="after")
    def _one_label_a_bucket(self) -> Bins:
        if not all(low < high for low, high in zip(self.edges, self.edges[1:], strict=False)):
            raise ValueError(f"edges {list(self.edges)} do not rise")
        if not self.labels or len(self.edges) != len(self.labels) + 1:
            raise ValueError(f"{len(self.labels)} labels for {len(self.edges)} edges, expected one fewer")
        if len(set(self.labels)) != len(self.labels):
            raise ValueError(f"labels {list(self.labels)} are not distinct")
        return self


class DetadRules(Section):
    """Thresholds and buckets of one analysis."""

    tious: Annotated[tuple[Annotated[float, Field(gt=0, le=1)], ...], Field(min_length=1)]
    """Every number but mAP_N's own thresholds is the mean over these."""
    bins: Annotated[dict[Characteristic, Bins], Field(min_length=1)]
    min_tiou: Annotated[float, Field(gt=0, le=1)] = 0.1
    """A false positive that overlaps every instance by less is a background error."""
    groups: Count = 10
    """G, the number of instances of a class, is the unit: its 10 G best detections are looked at."""
    min_precision: Fraction = 0.05
    """An instance found only where normalised precision is no higher counts as missed."""


THUMOS14 = DetadRules(
    tious=(0.5,),
    bins={
        "coverage": Bins(edges=(0, 0.02, 0.04, 0.06, 0.08, 1), labels=("XS", "S", "M", "L", "XL")),
        "length": Bins(edges=(0, 3, 6, 12, 18, np.inf), labels=("XS", "S", "M", "L", "XL")),
        "num-instances": Bins(edges=(-1, 1, 40, 80, np.inf), labels=("XS", "S", "M", "L")),
    },
)
ACTIVITYNET = DetadRules(
    tious=tuple(np.linspace(0.5, 0.95, 10).tolist()),
    bins={
        "coverage": Bins(edges=tuple(np.linspace(0, 1, 6).tolist()), labels=("XS", "S", "M", "L", "XL")),
        "length": Bins(edges=(0, 30, 60, 120, 180, np.inf), labels=("XS", "S", "M", "L", "XL")),
        "num-instances": Bins(edges=(-1, 1, 4, 8, np.inf), labels=("XS", "S", "M", "L")),
    },
)
BUILT_IN = {"thumos14": THUMOS14, "activitynet": ACTIVITYNET}


def load_rules(name_or_path: str) -> DetadRules:
    """Built-in rules by name, or those of a YAML file.

    Raises:
        ConfigError: neither; or the file is not YAML, or says something else. One line, naming it.
    """
    if name_or_path in BUILT_IN:
        return BUILT_IN[name_or_path]
    path = Path(name_or_path)
    if not path.is_file():
        raise ConfigError(
            f"DETAD rules '{name_or_path}' are neither a file nor one of: {', '.join(BUILT_IN)}"
        )
    try:
        return DetadRules.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in problem["loc"])
        raise ConfigError(f"{path}: {key}: {problem['msg'].removeprefix('Value error, ')}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read: {one_line(error)}") from None
