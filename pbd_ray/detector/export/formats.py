"""The formats by name. A new one is a value here."""

from __future__ import annotations

from pathlib import Path

from pbd_ray.detector.bundle import Bundle, bundle_files, load_bundle
from pbd_ray.detector.export.format import Format, Forward, Tolerance
from pbd_ray.detector.export.huggingface_files import read_huggingface, write_huggingface
from pbd_ray.detector.export.onnx_files import read_onnx, write_onnx
from pbd_ray.detector.export.opentad_files import read_opentad, write_opentad

_SAME = "the same tensors in the same code: not a bit may differ"


def _write_bundle(bundle: Bundle, folder: Path) -> None:
    for name, content in bundle_files(bundle.detector, bundle.classes, bundle.facts).items():
        (folder / name).write_bytes(content)


def _read_bundle(folder: Path, bundle: Bundle) -> Forward:
    return load_bundle(folder).detector


FORMATS = {
    format.name: format
    for format in (
        Format(
            name="safetensors",
            write=_write_bundle,
            read=_read_bundle,
            tolerance=Tolerance(0.0, 0.0, 0.0, _SAME),
            packages=("torch", "safetensors"),
        ),
        Format(
            name="opentad",
            write=write_opentad,
            read=read_opentad,
            tolerance=Tolerance(0.0, 0.0, 0.0, _SAME),
            packages=("torch",),
        ),
        Format(
            name="huggingface",
            write=write_huggingface,
            read=read_huggingface,
            tolerance=Tolerance(
                1e-4, 1e-4, 1e-4, "the layout has no position table: it is computed anew, to a few last bits"
            ),
            packages=("torch", "safetensors"),
        ),
        Format(
            name="onnx",
            write=write_onnx,
            read=read_onnx,
            tolerance=Tolerance(
                1e-3,
                1e-3,
                1e-3,
                "another program sums float32 in another order, in tens of layers one after the other",
            ),
            packages=("torch", "onnx", "onnxruntime", "onnxscript"),
        ),
    )
}
