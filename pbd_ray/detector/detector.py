"""The whole detector: backbone, then head. Losses (`losses`) and decoding (`postprocess`) are apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from pbd_ray.config import DetectorConfig
from pbd_ray.detector.actionformer import ActionFormer
from pbd_ray.detector.videomae import VideoMAE


@dataclass(frozen=True, eq=False)
class DetectorOutput:
    """What the detector says about a batch of windows at the P points of the pyramid."""

    logits: Tensor
    """(B, P, C), before the sigmoid."""
    offsets: Tensor
    """(B, P, 2) >= 0: distances to start and end in units of the level's stride."""
    mask: Tensor
    """(B, P) bool: the point lies in the video."""
    points: Tensor
    """(P, 4): t, low, high, stride in feature steps."""
    block_outputs: dict[int, Tensor] = field(default_factory=dict)
    """Original block index -> (B * chunks, N, d); empty unless asked for."""


class Detector(nn.Module):
    """Frames of windows to class logits and boundaries.

    Args:
        config: the uncompressed architecture.
        num_classes: C.
        kept_blocks: original indices of the backbone blocks that are there; None: all.

    Raises:
        ValueError: sizes that do not fit, or kept_blocks that are not ascending original indices.
    """

    def __init__(
        self, config: DetectorConfig, num_classes: int, kept_blocks: Sequence[int] | None = None
    ) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes {num_classes} must be at least 1")
        self.config = config
        self.num_classes = num_classes
        self.backbone = VideoMAE(config.backbone, config.grid, kept_blocks)
        self.head = ActionFormer(
            config.head, config.backbone.embed_dim, config.grid.feature_steps, num_classes
        )

    @property
    def kept_blocks(self) -> tuple[int, ...]:
        """Original indices of the backbone's blocks, ascending."""
        return self.backbone.kept_blocks

    def forward(self, frames: Tensor, mask: Tensor, with_block_outputs: bool = False) -> DetectorOutput:
        """Detect in a batch of windows.

        Args:
            frames: (B, 3, window_frames, H, W) RGB, 0..255, uint8 or float.
            mask: (B, feature_steps) bool, True where the window holds video.
            with_block_outputs: keep the output of every block (the feature alignment loss needs them).
        """
        tokens = self.backbone.embed(frames)
        block_outputs: dict[int, Tensor] = {}
        for index in self.kept_blocks:
            tokens = self.backbone.run_block(index, tokens)
            if with_block_outputs:
                block_outputs[index] = tokens
        return self.head_output(tokens, mask, block_outputs)

    def head_output(self, tokens: Tensor, mask: Tensor, block_outputs: dict[int, Tensor]) -> DetectorOutput:
        """The end of `forward`, from the last block's tokens (B * chunks, N, d)."""
        # shape[0], because len() is a plain int, which would fix the batch size of an exported graph.
        output = self.head(self.backbone.pool(tokens, mask.shape[0]), mask)
        return DetectorOutput(output.logits, output.offsets, output.mask, output.points, block_outputs)
