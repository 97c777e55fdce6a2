"""The detector against the paper's released modules: same weights, same frames, same numbers.

`mask_input` is off where padded steps matter: the release lets padded frames leak into the head's
first convolution, and ours, on purpose, does not.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from pbd_ray.config import BackboneConfig, DetectorConfig, GridConfig
from pbd_ray.detector.bundle import Bundle
from pbd_ray.detector.detector import Detector, DetectorOutput
from pbd_ray.detector.export.opentad_files import write_opentad
from pbd_ray.detector.losses import (
    DetectionLosses,
    assign_targets,
    detection_losses,
    diou_loss,
    focal_loss,
    updated_normalizer,
)
from pbd_ray.detector.opentad import load_opentad, opentad_key
from pbd_ray.detector.points import segments_at, sinusoid_table
from pbd_ray.detector.videomae import VideoMAE
from pbd_ray.detector.vit_weights import load_backbone

pytestmark = pytest.mark.golden

LEVELS = range(6)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def run(reference: Any, detector: Detector) -> DetectorOutput:
    inputs = reference.tensors("inputs")
    with torch.no_grad():
        return detector(inputs["frames"][:, 0], inputs["masks"].bool(), with_block_outputs=True)


def levels_of(outputs: dict[str, Tensor], name: str) -> Tensor:
    """Their per-level (B, C, T_l) as our (B, P, C)."""
    return torch.cat([outputs[f"{name}.{level}"] for level in LEVELS], dim=2).transpose(1, 2)


def test_position_table(reference_file: Callable[[str], Path]) -> None:
    reference = load_file(reference_file("unit_losses_posembed.safetensors"))
    close(sinusoid_table(1568, 48)[None], reference["posembed_14"])
    backbone = VideoMAE(BackboneConfig(embed_dim=48, num_heads=3, depth=1), GridConfig())
    close(backbone.position_table, reference["posembed_14"])
    close(backbone.positions(10, 10), reference["posembed_10_bicubic"])


def test_position_table_of_the_weights(reference: Any) -> None:
    theirs = reference.tensors("teacher_weights")["backbone.model.backbone.pos_embed"]
    close(Detector(reference.config, reference.classes).backbone.position_table, theirs)


@pytest.mark.parametrize("who", ["teacher", "student"])
def test_every_key_is_loaded(reference: Any, who: str) -> None:
    tensors = reference.tensors(f"{who}_weights")
    report = load_opentad(Detector(reference.config, reference.classes, reference.kept[who]), tensors)
    assert set(report.loaded) == set(tensors)
    assert report.ignored == {}


def test_an_export_is_the_file_of_the_release(reference: Any, tmp_path: Path) -> None:
    detector = reference.detector("teacher")
    names = tuple(f"class {label}" for label in range(reference.classes))
    write_opentad(Bundle(detector, reference.config, names, detector.kept_blocks, {}), tmp_path)
    written = torch.load(tmp_path / "checkpoint.pth", weights_only=True)["state_dict"]
    theirs = reference.tensors("teacher_weights")
    assert set(written) == {f"module.{name}" for name in theirs}
    assert all(torch.equal(written[f"module.{name}"], value.float()) for name, value in theirs.items())


def test_backbone_alone(reference: Any) -> None:
    """Their backbone in an mmaction2 file, `backbone.` before its keys, starts ours with the same weights."""
    tensors = {
        key.removeprefix("backbone.model."): value
        for key, value in reference.tensors("teacher_weights").items()
        if key.startswith("backbone.model.")
    }
    whole = reference.detector("teacher").backbone
    backbone = VideoMAE(reference.config.backbone, reference.config.grid)
    report = load_backbone(backbone, tensors)
    assert set(report.loaded) == set(tensors)
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in backbone.state_dict().items())


@pytest.mark.parametrize("who", ["teacher", "student"])
def test_block_outputs_and_features(reference: Any, who: str) -> None:
    detector = reference.detector(who)
    output = run(reference, detector)
    features = reference.tensors("block_features")
    assert tuple(output.block_outputs) == reference.kept[who]
    for index, tokens in output.block_outputs.items():
        close(tokens, features[f"{who}.block_out.{index}"])
    with torch.no_grad():
        frames = reference.tensors("inputs")["frames"][:, 0]
        close(detector.backbone(frames), reference.tensors("outputs")[f"{who}.backbone_feat"])


@pytest.mark.parametrize("who", ["teacher", "student"])
def test_attention_half_of_a_block(reference: Any, who: str) -> None:
    detector = reference.detector(who)
    block = detector.backbone.blocks["0"]
    with torch.no_grad():
        tokens = detector.backbone.embed(reference.tensors("inputs")["frames"][:, 0])
        middle = tokens + block.attn(block.norm1(tokens))
    close(middle, reference.tensors("block_features")[f"{who}.block_mid.0"])


@pytest.mark.parametrize("who", ["teacher", "student"])
def test_head(reference: Any, who: str) -> None:
    detector, outputs = reference.detector(who), reference.tensors("outputs")
    mask = reference.tensors("inputs")["masks"].bool()
    with torch.no_grad():
        pyramid = detector.head.pyramid(outputs[f"{who}.backbone_feat"], mask)
        for level, (x, m) in enumerate(pyramid):
            close(x, outputs[f"{who}.proj.{level}"])
            assert torch.equal(m, outputs[f"{who}.mask.{level}"].bool())
        for level, (x, _) in enumerate(detector.head.neck(pyramid)):
            close(x, outputs[f"{who}.fpn.{level}"])
    output = run(reference, detector)
    close(output.logits, levels_of(outputs, f"{who}.cls_logits"))
    close(output.offsets, levels_of(outputs, f"{who}.reg"))
    assert torch.equal(output.points, outputs[f"{who}.points"])
    proposals = segments_at(output.points, output.offsets)
    for i in range(2):
        close(proposals[i][output.mask[i]], outputs[f"{who}.proposals.{i}"])
        close(output.logits[i][output.mask[i]].sigmoid(), outputs[f"{who}.scores.{i}"])


def test_masked_input_changes_only_the_padded_sample(reference: Any) -> None:
    """The fix: sample 0 has no padding and keeps its numbers, sample 1 loses the leak."""
    detector = reference.detector("teacher")
    leaky = run(reference, detector)
    detector.head.mask_input = True
    fixed = run(reference, detector)
    assert torch.equal(leaky.logits[0], fixed.logits[0])
    assert (leaky.logits[1] - fixed.logits[1]).abs().max() > 0.01


def test_targets(reference: Any) -> None:
    outputs = reference.tensors("outputs")
    segments, labels = reference.truth()
    targets = assign_targets(outputs["student.points"], segments, labels, reference.classes, 1.5)
    assert torch.equal(targets.classes, outputs["targets.cls"])
    close(targets.offsets, outputs["targets.reg"])


def losses_of(reference: Any, training: bool) -> tuple[DetectionLosses, Tensor]:
    """The student's losses, and the normalizer after the batch."""
    detector = reference.detector("student")
    output = run(reference, detector.train(training))
    segments, labels = reference.truth()
    stored = detector.head.loss_normalizer
    targets = assign_targets(
        output.points, segments, labels, reference.classes, reference.config.head.center_radius
    )
    positives = targets.positive(output.mask).sum()
    if training:
        stored = updated_normalizer(stored, positives, reference.config.head.normalizer_momentum)
        used = stored
    else:  # the release evaluates with the batch's own positives
        used = positives.clamp(min=1).float()
    return detection_losses(output, segments, labels, reference.config.head, used, targets), stored


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_losses(reference: Any, mode: str) -> None:
    losses, normalizer = losses_of(reference, training=mode == "train")
    expected = reference.losses(mode)
    assert float(losses.focal) == pytest.approx(expected["cls_loss"], rel=1e-5)
    assert float(losses.boundary) == pytest.approx(expected["reg_loss"], rel=1e-5)
    assert int(losses.positives) == expected["num_pos"]
    assert float(normalizer) == pytest.approx(expected["loss_normalizer_after"], rel=1e-6)


def test_unit_losses(reference_file: Callable[[str], Path]) -> None:
    unit = load_file(reference_file("unit_losses_posembed.safetensors"))
    focal = focal_loss(unit["cls.student_logits"], unit["cls.targets"])
    close(focal, unit["focal_none"])
    assert float(focal.sum()) == pytest.approx(float(unit["focal_sum"]), rel=1e-5)
    diou = diou_loss(unit["seg.pred"], unit["seg.target"])
    close(diou, unit["diou_none"])
    assert float(diou.sum()) == pytest.approx(float(unit["diou_sum"]), rel=1e-5)
    assert float(diou.mean()) == pytest.approx(float(unit["diou_mean"]), rel=1e-5)


CANDIDATES = [("cand_2", "student", c) for c in (0, 1, 3, 4, 5)]
CANDIDATES += [("full_cand", "teacher", c) for c in (0, 1, 2, 3, 4, 5, None)]


@pytest.mark.parametrize(("name", "weights", "dropped"), CANDIDATES)
def test_candidates(reference: Any, name: str, weights: str, dropped: int | None) -> None:
    """A block taken out of the student, or of the teacher: features, boundaries and scores."""
    detector = reference.detector(weights, [k for k in reference.kept[weights] if k != dropped])
    outputs = reference.tensors("outputs")
    key = f"{name}_{'none' if dropped is None else dropped}"
    with torch.no_grad():
        features = detector.backbone(reference.tensors("inputs")["frames"][:, 0])
    close(features, outputs[f"{key}.backbone_feat"])
    output = run(reference, detector)
    proposals = segments_at(output.points, output.offsets)
    for i in range(2):
        # A boundary near 0 is the small difference of a time and a distance: beside the bounds of `close`
        # it may be off by some ten ulp of the distance, which differ between processors.
        ours, theirs = proposals[i][output.mask[i]], outputs[f"{key}.proposals.{i}"]
        distance = (theirs - output.points[output.mask[i], :1]).abs()
        assert ours.shape == theirs.shape
        assert ((ours - theirs).abs() <= 1e-5 + 1e-4 * theirs.abs() + 1e-6 * distance).all()
        close(output.logits[i][output.mask[i]].sigmoid(), outputs[f"{key}.scores.{i}"])


def test_head_keys_have_gradients_as_in_the_release(reference: Any) -> None:
    """Every parameter of ours has a twin there, and the head's all train."""
    weights = reference.tensors("teacher_weights")
    detector = Detector(reference.config, reference.classes)
    names = {opentad_key(name) for name in detector.state_dict()}
    assert names == set(weights)
    head = {opentad_key(f"head.{name}") for name, _ in detector.head.named_parameters()}
    assert head <= set(reference.tensors("grads"))


@pytest.mark.parametrize("size", ["S", "L"])
@pytest.mark.parametrize("drops", [0, 1, 2, 3, 4])
def test_parameter_counts(reference_file: Callable[[str], Path], size: str, drops: int) -> None:
    counts = json.loads(reference_file("counts.json").read_text())[f"{size}_drop{drops}"]
    large = {"embed_dim": 1024, "depth": 24, "num_heads": 16} if size == "L" else {}
    config = DetectorConfig(backbone=BackboneConfig(unused_norm=True, **large))
    with torch.device("meta"):
        detector = Detector(config, 20, range(config.backbone.depth - drops))
    backbone = {n: p.numel() for n, p in detector.backbone.named_parameters()}
    assert sum(backbone.values()) == counts["full_backbone"]
    assert sum(n for name, n in backbone.items() if name.startswith("patch_embed")) == counts["patch_embed"]
    assert sum(n for name, n in backbone.items() if ".norm" in name) == counts["block_norms"]
    assert sum(n for name, n in backbone.items() if "fc_norm" in name) == counts["fc_norm_unused"]
    assert sum(p.numel() for p in detector.head.parameters()) == counts["head_total"]
