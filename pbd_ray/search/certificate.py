"""certificate.json: what was exported, how far it is from its bundle, and what may be different."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table

import pbd_ray
from pbd_ray.detector.export.format import Format
from pbd_ray.report.plain import plain_text
from pbd_ray.search.hashing import bytes_hash
from pbd_ray.search.parity import Parity
from pbd_ray.search.records import map_to_json

CERTIFICATE = "certificate.json"


@dataclass(frozen=True)
class Certificate:
    """Of one format."""

    format: Format
    bundle: str
    """Hash of the bundle's weights."""
    kept_blocks: tuple[int, ...]
    """Original indices."""
    parity: Parity

    def to_json(self, folder: Path) -> dict[str, Any]:
        """The certificate of the files in a folder."""
        parity, tolerance = self.parity, asdict(self.format.tolerance)
        difference: dict[str, Any] = {"logits": parity.logits, "offsets": parity.offsets}
        detections = None
        if (found := parity.detections) is not None:
            difference |= {"map": found.map_difference}
            difference |= {"segments_seconds": found.segments_seconds, "scores": found.scores}
            detections = {
                "videos": found.videos,
                "bundle": found.bundle,
                "export": found.export,
                "bundle_map": map_to_json(found.bundle_map),
                "export_map": map_to_json(found.export_map),
            }
        return {
            "format": self.format.name,
            "bundle": self.bundle,
            "kept_blocks": list(self.kept_blocks),
            "compared_on": parity.inputs,
            "windows": parity.windows,
            "largest_difference": difference,
            "tolerance": tolerance,
            "detections": detections,
            "device": "cpu",
            "dtype": "float32",
            "threads": torch.get_num_threads(),
            "versions": versions(self.format.packages),
            "files": {
                path.name: bytes_hash(path.read_bytes())
                for path in sorted(folder.iterdir())
                if path.name != CERTIFICATE
            },
        }


def versions(packages: Sequence[str]) -> Mapping[str, str]:
    """Version of each package, and ours."""
    return {"pbd_ray": pbd_ray.__version__, **{name: import_module(name).__version__ for name in packages}}


def certificates_text(certificates: Sequence[Certificate]) -> str:
    """The largest differences, a row a format."""
    table = Table(box=box.SIMPLE, pad_edge=False)
    columns = ["format", "windows", "logits", "offsets"]
    if certificates[0].parity.detections is not None:
        columns += ["segments, s", "scores", "mAP", "detections"]
    for name in columns:
        table.add_column(name, justify="left" if name == "format" else "right")
    for certificate in certificates:
        parity = certificate.parity
        cells = [f"{number:.2g}" for number in (parity.logits, parity.offsets)]
        if (found := parity.detections) is not None:
            numbers = (found.segments_seconds, found.scores, found.map_difference)
            cells += [f"{number:.2g}" for number in numbers] + [f"{found.export} of {found.bundle}"]
        table.add_row(certificate.format.name, str(parity.windows), *cells)
    title = f"largest differences from the bundle, on {certificates[0].parity.inputs}"
    return f"{title}\n{plain_text(table, 120)}"


def wrote(folder: Path) -> bool:
    """Whether a folder holds an export and nothing else, so that another one may take its place."""
    try:
        certificate = json.loads((folder / CERTIFICATE).read_bytes())
        return {path.name for path in folder.iterdir()} <= {CERTIFICATE, *certificate["files"]}
    except (OSError, ValueError, TypeError, KeyError):
        return False
