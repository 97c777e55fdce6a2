"""The fine-tuning loop on random windows; the release's own steps are in the golden tier."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from pbd_ray.compression.blocks import Model, from_detector, to_detector
from pbd_ray.compression.finetune import Diverged, FineTuning, OneProcess
from pbd_ray.compression.schedule import learning_rate
from pbd_ray.config import AlignmentConfig, DetectorConfig
from pbd_ray.data.dataset import WindowBatch
from pbd_ray.detector.detector import Detector


@pytest.fixture
def make_run(config: DetectorConfig, student: Model, teacher: Model) -> Callable[..., FineTuning]:
    """A run of 2 steps an epoch; keywords change drop path, optimiser, alignment and constructor in turn."""

    def make(
        drop_path: float = 0.0,
        optimizer: Mapping[str, Any] | None = None,
        seed_key: tuple[int, ...] = (0, 1, 0),
        guide: Model | None = teacher,
        start: Model = student,
        alignment: Mapping[str, Any] | None = None,
        **rest: Any,
    ) -> FineTuning:
        backbone = config.backbone.model_copy(update={"drop_path": drop_path})
        head = config.head.model_copy(update={"drop_path": drop_path})
        options = {"epochs": 3, "schedule_epochs": 4, "warmup_epochs": 1, "head_lr": 3e-4, "batch_size": 3}
        return FineTuning(
            start,
            guide,
            config.model_copy(update={"backbone": backbone, "head": head}),
            4,
            AlignmentConfig.model_validate(
                {"optimizer": {**options, "ema_warmup": True, **(optimizer or {})}, **(alignment or {})}
            ),
            backbone_lr=1e-3,
            steps_per_epoch=2,
            seed_key=seed_key,
            **rest,
        )

    return make


@pytest.fixture
def batches(make_batch: Callable[..., WindowBatch]) -> list[WindowBatch]:
    return [make_batch(3, seed) for seed in range(6)]


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def part(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): value for n, value in state.items() if n.startswith(prefix)}


ROUNDING = ({"rel": 1e-5, "abs": 1e-6}, {"rel": 1e-5, "abs": 1e-6}, {"rel": 1e-3, "abs": 1e-5})
"""Step 0 is taken with rate 0. From step 2 on weights differ: a step of Adam is as long as the rate even
where the gradient is nothing but rounding."""


UNCLIPPED = {"clip_norm": 1e9}
"""Clipping would hide a gradient of the wrong length."""


def moments(run: FineTuning) -> dict[str, Tensor]:
    """Adam's first moments: sums of gradients."""
    return part(run.state(), "optimizer/exp_avg/")


def assert_alike(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    largest = max(float(value.abs().max()) for value in theirs.values())
    for name, value in theirs.items():
        assert float((ours[name] - value).abs().max()) < 1e-5 * largest, name


def test_same_seeds_same_run(make_run: Callable[..., FineTuning], batches: list[WindowBatch]) -> None:
    """Drop path included, whatever torch's global generator holds; and that one is left alone."""
    histories, states = [], []
    for global_seed, seed_key in ((1, (0, 1, 0)), (2, (0, 1, 0)), (1, (0, 1, 1)), (1, (5, 1, 0))):
        torch.manual_seed(global_seed)
        run = make_run(drop_path=0.5, seed_key=seed_key)
        before = torch.get_rng_state()
        histories.append([run.train_step(batch) for batch in batches[:3]])
        assert torch.equal(torch.get_rng_state(), before)
        states.append(run.state())
    assert histories[0] == histories[1] and same(states[0], states[1])
    assert len({history[0].total for history in histories}) == 3


@pytest.mark.parametrize("drop_path", [0.0, 0.5])
def test_drop_path_is_drawn_anew(
    make_run: Callable[..., FineTuning], batches: list[WindowBatch], drop_path: float
) -> None:
    """At every step and on every rank. Step 0 has rate 0: step 1 sees the same weights."""
    first, other = (make_run(drop_path=drop_path, collective=OneProcess(rank=rank)) for rank in (0, 1))
    losses = [run.train_step(batches[0]).feature for run in (first, first, other)]
    assert len(set(losses)) == (1 if drop_path == 0 else 3)


@pytest.mark.parametrize("done", [0, 1, 4])
def test_resuming(make_run: Callable[..., FineTuning], batches: list[WindowBatch], done: int) -> None:
    """Through the bytes of a checkpoint: losses, weights, EMA, moments, exactly."""
    whole = make_run(drop_path=0.5)
    expected = [whole.train_step(batch) for batch in batches]
    first = make_run(drop_path=0.5)
    for batch in batches[:done]:
        first.train_step(batch)
    first.remember_best()
    checkpoint = load(save(first.state()))
    assert same(checkpoint, first.state())
    second = make_run(drop_path=0.5)
    second.load_state(checkpoint)
    assert same(second.state(), checkpoint)
    best, before = part(checkpoint, "best/"), {name: value.clone() for name, value in checkpoint.items()}
    assert [second.train_step(batch) for batch in batches[done:]] == expected[done:]
    assert same(checkpoint, before)
    ours, theirs = second.state(), whole.state()
    assert same(part(ours, "best/"), best)
    assert same(*({n: v for n, v in state.items() if not n.startswith("best/")} for state in (ours, theirs)))


def test_a_state_is_a_snapshot(make_run: Callable[..., FineTuning], batches: list[WindowBatch]) -> None:
    run = make_run()
    run.train_step(batches[0])
    state = run.state()
    before = {name: value.clone() for name, value in state.items()}
    run.train_step(batches[1])
    assert same(state, before)


@pytest.mark.parametrize("parts", [2, 3, 7])
def test_accumulation_is_the_whole_batch(
    make_run: Callable[..., FineTuning], batches: list[WindowBatch], parts: int
) -> None:
    """In unequal parts too; windows hold different numbers of points and instances."""
    whole, pieces = (
        make_run(optimizer=UNCLIPPED),
        make_run(optimizer=UNCLIPPED | {"accumulation_steps": parts}),
    )
    for step, batch in enumerate(batches[:3]):
        expected, ours = (asdict(run.train_step(batch)) for run in (whole, pieces))
        assert ours == pytest.approx(expected, **ROUNDING[step])
        if step < 2:
            assert_alike(moments(pieces), moments(whole))
    assert float(pieces.normalizer) == float(whole.normalizer)


@pytest.mark.parametrize("accumulation_steps", [1, 2])
@pytest.mark.parametrize("count", [2, 3])
def test_ranks_are_one_process_with_the_same_global_batch(
    make_run: Callable[..., FineTuning],
    batches: list[WindowBatch],
    on_ranks: Callable[..., list[Any]],
    count: int,
    accumulation_steps: int,
) -> None:
    """Unequal shares: of 3 windows, rank 0 of 2 gets two. Losses, gradients, normaliser, to rounding."""
    alone = make_run(optimizer=UNCLIPPED)
    expected = [(asdict(alone.train_step(batch)), moments(alone)) for batch in batches[:3]]

    def work(**how: Any) -> tuple[FineTuning, list[Any]]:
        run = make_run(optimizer=UNCLIPPED | {"accumulation_steps": accumulation_steps}, **how)
        shares = [share(batch, run.collective.rank, count) for batch in batches[:3]]
        return run, [(asdict(run.train_step(mine)), moments(run)) for mine in shares]

    for run, history in on_ranks(count, work):
        for step in range(3):
            (ours, our_moments), (theirs, their_moments) = history[step], expected[step]
            assert ours == pytest.approx(theirs, **ROUNDING[step])
            if step < 2:
                assert_alike(our_moments, their_moments)
        assert float(run.normalizer) == float(alone.normalizer)


def share(batch: WindowBatch, rank: int, count: int) -> WindowBatch:
    mine = slice(rank, None, count)
    return WindowBatch(
        batch.frames[mine], batch.mask[mine], batch.segments[mine], batch.labels[mine], batch.windows[mine]
    )


@pytest.mark.parametrize("count", [1, 2])
def test_standardized_features(
    config: DetectorConfig, batches: list[WindowBatch], on_ranks: Callable[..., list[Any]], count: int
) -> None:
    """Mean 0 and deviation 1 in every channel over the real steps of all ranks' windows, EMA included."""
    with_norm = config.model_copy(
        update={"backbone": config.backbone.model_copy(update={"final_norm": True})}
    )
    start = from_detector(Detector(with_norm, 4))

    def work(**how: Any) -> FineTuning:
        options = AlignmentConfig(trainable="head")
        run = FineTuning(start, None, with_norm, 4, options, 1e-3, 2, seed_key=(0,), **how)
        run.standardize_features(share(batch, run.collective.rank, count) for batch in batches)
        return run

    for run in on_ranks(count, work):
        assert set(run.ema) == {n for n in start.weights if not n.startswith("backbone.")} - {
            "head.loss_normalizer"
        } | {"backbone.norm.weight", "backbone.norm.bias"}
        with torch.no_grad(), run.ema_student() as student:
            features = [student.backbone(batch.frames).transpose(1, 2)[batch.mask] for batch in batches]
        values = torch.cat(features).double().numpy()
        np.testing.assert_allclose(values.mean(axis=0), 0, atol=1e-4)
        np.testing.assert_allclose(values.std(axis=0), 1, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "decays"),
    [
        ({"ema_warmup": False, "ema_decay": 0.9}, (0.9, 0.9, 0.9)),
        ({"ema_warmup": True, "ema_decay": 0.999}, (1 / 10, 2 / 11, 3 / 12)),
        ({"ema_warmup": True, "ema_decay": 0.15}, (1 / 10, 0.15, 0.15)),
    ],
)
def test_ema(
    make_run: Callable[..., FineTuning],
    batches: list[WindowBatch],
    options: dict[str, Any],
    decays: tuple[float, ...],
) -> None:
    """Of the trained tensors, LoRA factors apart: ema = d ema + (1 - d) weight."""
    run = make_run(optimizer=options)
    expected = {name: value.double() for name, value in part(run.state(), "ema/").items()}
    assert same(part(run.state(), "ema/"), part(run.state(), "student/"))
    for decay, batch in zip(decays, batches, strict=False):
        run.train_step(batch)
        state = run.state()
        for name, value in part(state, "student/").items():
            expected[name] = decay * expected[name] + (1 - decay) * value.double()
            torch.testing.assert_close(state[f"ema/{name}"].double(), expected[name], rtol=1e-6, atol=1e-7)
    assert any(".lora_A." in name for name in expected) and any(".lora_B." in name for name in expected)


def trained_values(run: FineTuning) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in run.student.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("fails", [False, True])
def test_ema_student(make_run: Callable[..., FineTuning], batches: list[WindowBatch], fails: bool) -> None:
    """EMA weights in eval mode inside; trained weights back outside, after an error too."""
    run = make_run()
    for batch in batches[:3]:
        run.train_step(batch)
    before, ema = trained_values(run), part(run.state(), "ema/")
    assert not same(before, ema)
    try:
        with run.ema_student() as student:
            assert not student.training
            assert same(trained_values(run), ema)
            if fails:
                raise KeyError("evaluation")
    except KeyError:
        pass
    assert same(trained_values(run), before)
    assert same(part(run.state(), "ema/"), ema)
    reference = make_run()
    for batch in batches[:3]:
        reference.train_step(batch)
    assert run.train_step(batches[3]) == reference.train_step(batches[3])


def test_best_model(
    make_run: Callable[..., FineTuning], batches: list[WindowBatch], config: DetectorConfig, student: Model
) -> None:
    """The remembered EMA weights, not the last ones, with LoRA merged."""
    run = make_run()
    for batch in batches[:3]:
        run.train_step(batch)
    run.remember_best()
    with run.ema_student() as detector, torch.no_grad():
        expected = detector(batches[0].frames, batches[0].mask)
    for batch in batches[3:]:
        run.train_step(batch)
    with run.ema_student() as detector, torch.no_grad():
        last = detector(batches[0].frames, batches[0].mask)
    model = run.best_model()
    assert model.kept_blocks == student.kept_blocks and model.weights.keys() == student.weights.keys()
    with torch.no_grad():
        ours = to_detector(model, config, 4)(batches[0].frames, batches[0].mask)
    torch.testing.assert_close(ours.logits, expected.logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.offsets, expected.offsets, rtol=0, atol=1e-5)
    assert float((last.logits - expected.logits).abs().max()) > 1e-4


@pytest.mark.parametrize("mode", ["lora", "lora_only", "full"])
def test_only_what_trains_moves(
    make_run: Callable[..., FineTuning], batches: list[WindowBatch], mode: str
) -> None:
    """Everything frozen stays bit for bit, the teacher too; what trains moves, but what cannot matter."""
    run = make_run(alignment={"trainable": mode})
    assert run.teacher is not None
    before = {name: value.clone() for name, value in run.student.state_dict().items()}
    guide = {name: value.clone() for name, value in run.teacher.state_dict().items()}
    for batch in batches[:3]:
        run.train_step(batch)
    assert same(run.teacher.state_dict(), guide) and not run.teacher.training
    moved = {n for n, value in run.student.state_dict().items() if not torch.equal(value, before[n])}
    trained = set(trained_values(run))
    assert moved - {"head.loss_normalizer"} <= trained
    # Offsets that are cut off at 0 may leave a level's scale without a gradient.
    assert not {name for name in trained - moved if "boundary_scales" not in name}


def test_a_teacher_is_fitted_without_a_guide(
    make_run: Callable[..., FineTuning], batches: list[WindowBatch], teacher: Model
) -> None:
    run = make_run(guide=None, start=teacher, alignment={"trainable": "full"}, optimizer={"epochs": 3})
    losses = [run.train_step(batch) for batch in batches]
    for terms in losses:
        assert (terms.feature, terms.class_kl, terms.boundary_distillation) == (0, 0, 0)
        assert terms.total == pytest.approx(terms.focal + terms.boundary)


@pytest.mark.parametrize(("activation", "apart"), [("gelu", False), ("relu", True)])
def test_a_guide_of_another_activation(
    make_run: Callable[..., FineTuning],
    batches: list[WindowBatch],
    config: DetectorConfig,
    teacher: Model,
    activation: str,
    apart: bool,
) -> None:
    """The student has the teacher's own weights: what keeps them apart is the activation alone."""
    backbone = config.backbone.model_copy(update={"activation": activation})
    guide_config = config.model_copy(update={"backbone": backbone})
    losses = make_run(start=teacher, guide_config=guide_config).train_step(batches[0])
    assert (losses.feature > 1e-4) is apart
    assert (losses.boundary_distillation > 1e-4) is apart


def test_terms_add_up(make_run: Callable[..., FineTuning], batches: list[WindowBatch]) -> None:
    run = make_run(alignment={"feature_weight": 0.5, "class_weight": 2.0, "boundary_weight": 3.0})
    terms = run.train_step(batches[0])
    weighted = 0.5 * terms.feature + 2 * terms.class_kl + 3 * terms.boundary_distillation
    assert min(asdict(terms).values()) > 0
    assert terms.total == pytest.approx(terms.focal + terms.boundary + weighted, rel=1e-6)


def test_training_lowers_the_losses(
    make_run: Callable[..., FineTuning], batches: list[WindowBatch], teacher: Model
) -> None:
    """Supervised ones, once the falling normaliser is taken out; the student's distance to its teacher."""
    options = {"head_lr": 3e-3, "epochs": 20, "schedule_epochs": 20}
    alone = make_run(optimizer=options, guide=None, start=teacher, alignment={"trainable": "full"})
    guided = make_run(optimizer=options)
    history = [(alone.train_step(batches[0]), float(alone.normalizer)) for _ in range(40)]
    (first, first_count), (last, last_count) = history[0], history[-1]
    assert last.focal * last_count < 0.7 * first.focal * first_count
    assert last.boundary * last_count < 0.7 * first.boundary * first_count
    distances = [guided.train_step(batches[0]).feature for _ in range(40)]
    assert distances[-1] < 0.3 * distances[0]


def test_rates_of_the_groups(make_run: Callable[..., FineTuning], batches: list[WindowBatch]) -> None:
    """The grid moves the backbone group; the head keeps the recipe's rate."""
    run = make_run()
    for step, batch in enumerate(batches[:4]):
        run.train_step(batch)
        options = run.config.optimizer
        rates = {group["name"]: group["lr"] for group in run.optimizer.param_groups}
        head = learning_rate(step, 3e-4, options, 2)
        assert rates == {
            "backbone": learning_rate(step, 1e-3, options, 2), "head": head, "head_no_decay": head
        }  # fmt: skip
    decays = {group["name"]: group["weight_decay"] for group in run.optimizer.param_groups}
    assert decays == {"backbone": 0.05, "head": 0.05, "head_no_decay": 0.0}
    alone = make_run(alignment={"trainable": "lora_only"})
    assert [group["name"] for group in alone.optimizer.param_groups] == ["backbone"]


def test_a_loss_that_is_not_finite(
    make_run: Callable[..., FineTuning], batches: list[WindowBatch], student: Model
) -> None:
    """One line, naming step and rate; the step has not been taken."""
    weights = dict(student.weights)
    weights["head.class_output.bias"] = weights["head.class_output.bias"] * float("nan")
    run = make_run(start=Model(student.kept_blocks, weights))
    before = trained_values(run)
    with pytest.raises(Diverged, match=r"^loss nan at step 0 with learning rate 0\.001$"):
        run.train_step(batches[0])
    assert run.step == 0
    assert all(
        torch.equal(value, before[n]) or n.endswith("class_output.bias")
        for n, value in trained_values(run).items()
    )


def test_a_gradient_that_is_finite_at_no_scale(
    make_run: Callable[..., FineTuning], batches: list[WindowBatch]
) -> None:
    """Half precision: steps are skipped and the scale halved, until it cannot be the reason."""
    run = make_run()
    run.scaler = torch.amp.GradScaler("cpu", init_scale=4.0, backoff_factor=0.5)
    before = trained_values(run)
    run.student.backbone.patch_embed.weight.register_hook(lambda gradient: gradient * float("inf"))
    for _ in range(3):  # 4, 2, 1
        run.train_step(batches[0])
    with pytest.raises(Diverged, match=r"^gradient norm (nan|inf) at step 3 with learning rate 0\.001$"):
        run.train_step(batches[0])
    assert same(trained_values(run), before)


def test_a_gradient_that_is_not_finite(
    make_run: Callable[..., FineTuning], batches: list[WindowBatch]
) -> None:
    """The loss is still fine: without the check, weights and EMA would be lost one step later."""
    run = make_run()
    run.train_step(batches[0])
    before, ema = trained_values(run), part(run.state(), "ema/")
    run.student.backbone.patch_embed.weight.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(Diverged, match=r"^gradient norm (nan|inf) at step 1 with learning rate 0\.001$"):
        run.train_step(batches[1])
    assert same(trained_values(run), before) and same(part(run.state(), "ema/"), ema)


def test_half_precision(make_run: Callable[..., FineTuning], batches: list[WindowBatch]) -> None:
    """Weights, losses and teacher targets near those of full precision; weights stay float32."""
    exact, half = make_run(), make_run(autocast="bfloat16")
    for batch in batches[:3]:
        ours, theirs = (asdict(run.train_step(batch)) for run in (half, exact))
        assert ours != theirs
        assert ours == pytest.approx(theirs, rel=0.1, abs=0.01)
    assert {value.dtype for value in trained_values(half).values()} == {torch.float32}


def test_the_loss_scale_is_resumed(make_run: Callable[..., FineTuning], batches: list[WindowBatch]) -> None:
    """float16 trains with a scaled loss (on GPUs; here by hand): the scale and its counter go on."""

    def scaled() -> FineTuning:
        run = make_run()
        run.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
        return run

    whole = scaled()
    for batch in batches[:3]:
        whole.train_step(batch)
    assert whole.scaler.get_scale() == 2048
    checkpoint = load(save(whole.state()))
    again = scaled()
    again.load_state(checkpoint)
    assert same(again.state(), checkpoint)
    assert again.train_step(batches[3]) == whole.train_step(batches[3])
    assert again.scaler.get_scale() == whole.scaler.get_scale() == 4096
    make_run().load_state(checkpoint)  # a run without a scaler, as where the final model is taken out


def test_checkpointing_changes_memory_not_numbers(
    make_run: Callable[..., FineTuning], batches: list[WindowBatch]
) -> None:
    plain = make_run(drop_path=0.5)
    saving = make_run(drop_path=0.5, optimizer={"activation_checkpointing": True})
    for batch in batches[:2]:
        assert saving.train_step(batch) == plain.train_step(batch)


def test_padding_only_windows_are_no_division_by_zero(
    make_run: Callable[..., FineTuning], batches: list[WindowBatch]
) -> None:
    """A batch without any instance."""
    batch = batches[0]
    nothing = WindowBatch(
        batch.frames,
        batch.mask,
        tuple(segments[:0] for segments in batch.segments),
        tuple(labels[:0] for labels in batch.labels),
        batch.windows,
    )
    run = make_run()
    terms = run.train_step(nothing)
    assert (terms.boundary, terms.boundary_distillation) == (0, 0)
    assert terms.focal > 0 and float(run.normalizer) == pytest.approx(0.9 * 100 + 0.1 * 1)


def test_the_student_a_run_starts_from_is_left_alone(
    make_run: Callable[..., FineTuning], batches: list[WindowBatch], student: Model, teacher: Model
) -> None:
    copies = [{n: v.copy() for n, v in model.weights.items()} for model in (student, teacher)]
    run = make_run(alignment={"trainable": "full"})
    run.train_step(batches[0])
    run.train_step(batches[1])
    for model, copy in zip((student, teacher), copies, strict=True):
        assert all((model.weights[name] == value).all() for name, value in copy.items())


def test_no_adapter_is_left_in_a_model(make_run: Callable[..., FineTuning], config: DetectorConfig) -> None:
    run = make_run()
    run.best_model()
    assert isinstance(run.student, Detector)
    assert from_detector(run.student).weights.keys() == Detector(config, 4, (0, 2, 3, 4)).state_dict().keys()
