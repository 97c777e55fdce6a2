"""The whole detector as an ONNX graph, from uint8 frames to logits and offsets, for any batch size.

Decoding and suppression (`detector/postprocess.py`) stay outside: they are no neural network.
"""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pbd_ray.config import UserError, one_line
from pbd_ray.detector.bundle import Bundle
from pbd_ray.detector.detector import Detector, DetectorOutput
from pbd_ray.detector.export.format import Forward

GRAPH = "model.onnx"
INPUTS = ("frames", "mask")
OUTPUTS = ("logits", "offsets", "point_mask", "points")


class ExportError(UserError):
    """An export cannot be made or read here. The message is one line for the user."""


class _Outputs(nn.Module):
    """The detector with a tuple for an output, which is all that ONNX knows."""

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, frames: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        output = self.detector(frames, mask)
        return output.logits, output.offsets, output.mask, output.points


def write_onnx(bundle: Bundle, folder: Path) -> None:
    """model.onnx, in the opset that is torch's default.

    Raises:
        ExportError: the packages of the extra `export` are not installed.
    """
    onnxruntime()  # before the minutes that the export of a large detector takes
    grid = bundle.config.grid
    # Two windows: a batch of one might be taken for a constant.
    frames = torch.zeros((2, 3, grid.window_frames, grid.crop_pixels, grid.crop_pixels), dtype=torch.uint8)
    mask = torch.ones((2, grid.feature_steps), dtype=torch.bool)
    batch = {0: torch.export.Dim("batch", min=1)}
    # It tells that `points` is a constant and an output: that is meant.
    logging.getLogger("onnx_ir.passes.common.initializer_deduplication").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        # The mask's batch size is the frames': that is meant.
        warnings.filterwarnings(
            "ignore", message="# The axis name: batch will not be used", category=UserWarning
        )
        program = torch.onnx.export(
            _Outputs(bundle.detector).eval(),
            (frames, mask),
            dynamo=True,
            dynamic_shapes=(batch, batch),
            input_names=INPUTS,
            output_names=OUTPUTS,
            verbose=False,
        )
    assert program is not None, "torch.onnx.export returns a program where dynamo is on"
    program.save(folder / GRAPH, external_data=False)


def read_onnx(folder: Path, bundle: Bundle) -> Forward:
    """The graph in ONNX Runtime, on the CPU.

    Raises:
        ExportError: onnxruntime is not installed, or cannot load the file.
    """
    runtime = onnxruntime()
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = runtime.InferenceSession(folder / GRAPH, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own types share no base
        raise ExportError(f"{folder / GRAPH}: onnxruntime cannot load it: {one_line(error)[:200]}") from None

    def forward(frames: Tensor, mask: Tensor) -> DetectorOutput:
        outputs = session.run(OUTPUTS, {"frames": frames.numpy(), "mask": mask.numpy()})
        logits, offsets, point_mask, points = (torch.from_numpy(output) for output in outputs)
        return DetectorOutput(logits, offsets, point_mask, points)

    return forward


def onnxruntime() -> Any:
    """The module.

    Raises:
        ExportError: it, or what the export needs, is not installed.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401 (torch.onnx.export needs it, and says so less well)
    except ImportError as error:
        raise ExportError(f"onnx: {error.name} is not installed: pip install 'pbd_ray[export]'") from None
    return onnxruntime
