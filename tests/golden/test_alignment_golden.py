"""Alignment against the paper's released training loop: same weights, same frames, same losses, gradients
and weights after six optimiser steps.

Two faults of the release are emulated here, and ours has neither: padded frames leak into the head's first
convolution (`mask_input` off), and its loss normaliser is an int64 buffer, so that its EMA truncates.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from pbd_ray.compression.alignment import alignment_terms, class_loss, feature_loss
from pbd_ray.compression.blocks import from_detector, to_detector
from pbd_ray.compression.finetune import FineTuning
from pbd_ray.compression.schedule import learning_rate
from pbd_ray.config import AlignmentConfig, OptimizerConfig
from pbd_ray.data.dataset import WindowBatch
from pbd_ray.detector.detector import Detector
from pbd_ray.detector.losses import assign_targets, detection_losses
from pbd_ray.detector.opentad import load_opentad, opentad_key
from pbd_ray.detector.points import segments_at
from pbd_ray.detector.videomae import VideoMAE

pytestmark = pytest.mark.golden

CONFIG = AlignmentConfig(
    rank=12,
    optimizer=OptimizerConfig(
        epochs=3, schedule_epochs=6, warmup_epochs=2, head_lr=1e-4, weight_decay=0.05, clip_norm=1.0,
        ema_decay=0.999,
    ),
)  # fmt: skip
TERMS = {
    "cls_loss": "focal",
    "reg_loss": "boundary",
    "loss_out": "feature",
    "loss_cls_kd": "class_kl",
    "loss_reg_kd": "boundary_distillation",
    "cost": "total",
}
"""Their name of a loss -> ours."""
NOISE = (".attention.key.bias", ".attention.key_norm.bias")
"""What is added to all keys alike, softmax does not see: the gradient is 0, its float value rounding."""
EPSILON = torch.finfo(torch.float32).eps


def window_batch(reference: Any) -> WindowBatch:
    inputs = reference.tensors("inputs")
    segments, labels = reference.truth()
    # Training looks at tensors only: what the windows are of does not matter.
    return WindowBatch(inputs["frames"][:, 0], inputs["masks"].bool(), segments, labels, windows=(None, None))


def flipped(batch: WindowBatch) -> WindowBatch:
    """The same windows in the other order."""
    return WindowBatch(
        batch.frames.flip(0), batch.mask.flip(0), batch.segments[::-1], batch.labels[::-1], batch.windows
    )


FACTOR = re.compile(r"backbone\.(blocks\.\d+\.attn)\.(qkv|proj)\.lora_(A|B)\.default\.weight")


def their_name(name: str) -> tuple[str, bool]:
    """Their name of one of a student's parameters, and whether it is transposed there."""
    factor = FACTOR.fullmatch(name)
    if factor:
        return f"backbone.model.backbone.{factor[1]}.lora_{factor[2]}.{factor[3]}", True
    return opentad_key(name.replace(".base_layer", "")), False


def in_our_names(names: Any, theirs: dict[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    found = {}
    for name in names:
        key, transposed = their_name(name)
        value = theirs[prefix + key]
        found[name] = value.T if transposed else value
    return found


def trained(run: FineTuning) -> dict[str, torch.nn.Parameter]:
    return {name: value for name, value in run.student.named_parameters() if value.requires_grad}


@pytest.fixture
def run(reference: Any) -> FineTuning:
    return another_run(reference)


def another_run(reference: Any) -> FineTuning:
    """A fine-tuning run that stands where the release's six steps began."""
    run = FineTuning(
        from_detector(reference.detector("student", merge_lora=False)),
        from_detector(reference.detector("teacher")),
        reference.config,
        reference.classes,
        CONFIG,
        backbone_lr=1e-4,
        steps_per_epoch=2,
        seed_key=(0,),
    )
    run.student.head.mask_input = run.teacher.head.mask_input = False
    parameters = trained(run)
    start = in_our_names(parameters, reference.tensors("student_weights"))
    with torch.no_grad():
        for name, value in start.items():
            parameters[name].copy_(value)
    run.ema = {name: value.clone() for name, value in start.items()}
    return run


def losses_of(run: FineTuning, batch: WindowBatch, normalizer: float) -> dict[str, Tensor]:
    """Every term and the total, under their names."""
    student = run.student(batch.frames, batch.mask, with_block_outputs=True)
    with torch.no_grad():
        teacher = run.teacher(batch.frames, batch.mask, with_block_outputs=True)
    head, classes = run.student.config.head, run.student.num_classes
    targets = assign_targets(student.points, batch.segments, batch.labels, classes, head.center_radius)
    supervised = detection_losses(
        student, batch.segments, batch.labels, head, torch.tensor(normalizer), targets=targets
    )
    positive = targets.positive(student.mask)
    valid_points, positives = student.mask.sum(), positive.sum()
    terms = alignment_terms(student, teacher, positive, CONFIG, float(valid_points), float(positives))
    return {
        "num_valid": valid_points,
        "num_pos": positives,
        "cls_loss": supervised.focal,
        "reg_loss": supervised.boundary,
        "loss_out": terms.feature,
        "loss_cls_kd": terms.class_kl,
        "loss_reg_kd": terms.boundary,
        "cost_paper_weights": supervised.total + terms.weighted(CONFIG),
    }


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_losses(reference: Any, run: FineTuning, mode: str) -> None:
    """The release divides by its running normaliser in training, by the batch's positives in evaluation."""
    expected = reference.losses(mode)
    run.student.train(mode == "train")
    normalizer = expected["loss_normalizer_after"] if mode == "train" else expected["num_pos"]
    ours = losses_of(run, window_batch(reference), normalizer)
    assert {name: float(value.detach()) for name, value in ours.items()} == pytest.approx(
        {name: expected[name] for name in ours}, rel=1e-5
    )


def test_what_is_distilled(reference: Any, run: FineTuning) -> None:
    """The teacher's logits at valid points and its segments at positive ones, window by window."""
    outputs, batch = reference.tensors("outputs"), window_batch(reference)
    with torch.no_grad():
        teacher = run.teacher(batch.frames, batch.mask)
    radius = reference.config.head.center_radius
    targets = assign_targets(teacher.points, batch.segments, batch.labels, reference.classes, radius)
    logits = teacher.logits[teacher.mask]
    segments = segments_at(teacher.points, teacher.offsets)[targets.positive(teacher.mask)]
    torch.testing.assert_close(logits, outputs["kd.cls_target"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(segments, outputs["kd.reg_target"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_the_loss_the_release_computes_and_does_not_use(reference: Any, run: FineTuning, mode: str) -> None:
    """`loss_mid`, the feature loss halfway through the blocks: ours has no such loss, but the same values."""
    run.student.train(mode == "train")
    frames = window_batch(reference).frames
    with torch.no_grad():
        student, teacher = (middles(detector.backbone, frames) for detector in (run.student, run.teacher))
    assert float(feature_loss(student, teacher)) == pytest.approx(
        reference.losses(mode)["loss_mid"], rel=1e-5
    )


def middles(backbone: VideoMAE, frames: Tensor) -> dict[int, Tensor]:
    """Tokens after the attention residual of every block."""
    tokens, found = backbone.embed(frames), {}
    for index in backbone.kept_blocks:
        block = backbone.blocks[str(index)]
        found[index] = tokens + block.attn(block.norm1(tokens))
        tokens = backbone.run_block(index, tokens)
    return found


def test_gradients(reference: Any, run: FineTuning) -> None:
    """Of everything that trains, before clipping, within 1e-4 of a tensor's largest gradient."""
    expected = reference.tensors("grads")
    run.student.train()
    normalizer = reference.losses("train")["loss_normalizer_after"]
    losses_of(run, window_batch(reference), normalizer)["cost_paper_weights"].backward()
    parameters = trained(run)
    assert {their_name(name)[0] for name in parameters} == set(expected)
    squares = 0.0
    for name, theirs in in_our_names(parameters, expected).items():
        ours = parameters[name].grad
        largest = float(theirs.abs().max())
        if name.endswith(NOISE):
            assert max(largest, float(ours.abs().max())) < 1e-7, name
        else:
            assert float((ours - theirs).abs().max()) <= 1e-4 * largest, name
        squares += float(ours.double().square().sum())
    assert squares**0.5 == pytest.approx(reference.results()["losses"]["grad_total_l2"], rel=1e-5)


def test_what_trains(reference: Any, run: FineTuning) -> None:
    """Names as in the release, less `fc_norm`: it asks for a gradient there and never gets one."""
    losses = reference.results()["losses"]
    names = {their_name(name)[0]: value.requires_grad for name, value in run.student.named_parameters()}
    assert {name for name, trains in names.items() if trains} == set(losses["params_with_grad"])
    idle = losses["params_without_grad_but_requires_grad"]
    frozen = {name for name, trains in names.items() if not trains}
    assert frozen - set(idle) == set(losses["params_frozen"]) - {"backbone.model.backbone.pos_embed"}
    assert set(idle) <= frozen


def test_optimizer_groups(reference: Any, run: FineTuning) -> None:
    """The same tensors are decayed; which group's rate the grid moves is the backbone's."""
    steps = reference.steps()
    theirs = {
        name: ("backbone" if "backbone" in name else "head", group["weight_decay"])
        for group, names in zip(steps["param_groups"], steps["param_group_names"], strict=True)
        for name in names
        if "fc_norm" not in name
    }
    ours = {}
    names = {id(value): their_name(name)[0] for name, value in run.student.named_parameters()}
    for group in run.optimizer.param_groups:
        part = group["name"].removesuffix("_no_decay")
        ours |= {names[id(value)]: (part, group["weight_decay"]) for value in group["params"]}
    assert ours == theirs
    for group in run.optimizer.param_groups:
        assert (group["betas"], group["eps"]) == ((0.9, 0.999), 1e-8)


def test_six_steps(reference: Any, run: FineTuning) -> None:
    """Losses of every step, then weights, EMA weights and normaliser at the end."""
    expected, batch = reference.steps(), window_batch(reference)
    normalizers = []
    for step, theirs in enumerate(expected["steps"]):
        losses = run.train_step(flipped(batch) if step % 2 else batch)
        normalizers.append(float(run.normalizer))
        ours = {name: getattr(losses, TERMS[name]) for name in TERMS}
        assert ours == pytest.approx({name: theirs[name] for name in TERMS}, rel=1e-4), step
        # Theirs is read after the scheduler's step: it is the next one's.
        rate = learning_rate(step + 1, 1e-4, CONFIG.optimizer, 2)
        assert rate == pytest.approx(theirs["lr"], rel=1e-9)
    parameters = trained(run)
    student = in_our_names(parameters, reference.tensors("train6_student"), "student.")
    ema = in_our_names(parameters, reference.tensors("train6_ema"), "ema.")
    start = in_our_names(parameters, reference.tensors("student_weights"))
    for name, value in parameters.items():
        if not name.endswith(NOISE):
            assert_moved_alike(name, start[name], value.detach(), student[name])
            assert_moved_alike(name, start[name], run.ema[name], ema[name])
    assert normalizers[-1] == pytest.approx(expected["loss_normalizer_student"], rel=1e-6)
    truncated = 100
    for value in normalizers:
        truncated = int(0.999 * truncated + 0.001 * value)
    assert truncated == expected["loss_normalizer_ema"]


def merged(reference: Any, which: str, prefix: str) -> Detector:
    """The detector of the release's weights after six steps, its LoRA merged."""
    trained = {
        name.removeprefix(prefix): value
        for name, value in reference.tensors(which).items()
        if "fc_norm" not in name
    }
    detector = Detector(reference.config, reference.classes, reference.kept["student"]).eval()
    load_opentad(detector, reference.tensors("student_weights") | trained)
    return detector


def test_where_the_next_round_starts(reference: Any, run: FineTuning) -> None:
    """The release: the student from its raw weights, what is scored from the EMA. Ours: both from the EMA."""
    batch = window_batch(reference)
    for step in range(6):
        run.train_step(flipped(batch) if step % 2 else batch)
    ends = [merged(reference, "train6_student", "student."), merged(reference, "train6_ema", "ema.")]
    raw, averaged = (run_eval(detector, batch) for detector in ends)
    state = run.state()
    run.remember_best()
    ours = run_eval(to_detector(run.best_model(), reference.config, reference.classes), batch)
    apart = float((raw - averaged).norm())
    assert float((ours - averaged).norm()) < 0.01 * apart

    emulated = another_run(reference)
    emulated.load_state(state | {name.replace("student/", "best/"): value for name, value in state.items()
                                 if name.startswith("student/")})  # fmt: skip
    theirs = run_eval(to_detector(emulated.best_model(), reference.config, reference.classes), batch)
    assert float((theirs - raw).norm()) < 0.01 * apart


def run_eval(detector: Detector, batch: WindowBatch) -> Tensor:
    detector.head.mask_input = False
    with torch.no_grad():
        return detector.eval()(batch.frames, batch.mask).logits


def assert_moved_alike(name: str, start: Tensor, ours: Tensor, theirs: Tensor) -> None:
    """The same way to 1 %, but for the rounding of six sums: EMA weights move by less than that."""
    difference, moved = (ours - theirs).norm(), (theirs - start).norm()
    assert float(difference) <= float(0.01 * moved + 6 * EPSILON * theirs.norm()), name


@pytest.mark.parametrize(("name", "temperature"), [("kl_T1", 1.0), ("kl_T3.5", 3.5)])
def test_class_loss(reference_file: Callable[[str], Path], name: str, temperature: float) -> None:
    unit = load_file(reference_file("unit_losses_posembed.safetensors"))
    student, teacher = unit["cls.student_logits"], unit["cls.teacher_logits"]
    ours = class_loss(student, teacher, temperature) / len(student)
    assert float(ours) == pytest.approx(float(unit[name]), rel=1e-5)


def test_class_loss_of_one_class_is_not_the_release_s(reference_file: Callable[[str], Path]) -> None:
    """There it is identically 0; ours is the Bernoulli KL, on purpose."""
    unit = load_file(reference_file("unit_losses_posembed.safetensors"))
    assert float(unit["kl_single_class_T3.5"]) == 0
    student, teacher = unit["cls.student_logits"][:, :1], unit["cls.teacher_logits"][:, :1]
    assert float(class_loss(student, teacher, 3.5)) > 0.1


@pytest.mark.parametrize("name", ["thumos_s_iters10", "thumos_s_iters100_first8epochs", "thumos_l_iters10"])
def test_schedule(reference_file: Callable[[str], Path], name: str) -> None:
    with gzip.open(reference_file("lr_schedule.json.gz")) as file:
        case = json.load(file)[name]
    options = OptimizerConfig(
        epochs=case["epochs"], schedule_epochs=case["max_epoch"], warmup_epochs=case["warmup_epoch"]
    )
    rates = [
        learning_rate(step, case["base_lr"], options, case["iters_per_epoch"])
        for step in range(len(case["lr"]))
    ]
    assert len(rates) == case["epochs"] * case["iters_per_epoch"]
    assert rates == pytest.approx(case["lr"], rel=1e-9, abs=0)
