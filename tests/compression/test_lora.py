"""LoRA: what trains, where the factors start, what merging leaves."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from pbd_ray.compression.lora import merge_lora, prepare_student
from pbd_ray.config import AlignmentConfig, BackboneConfig, DetectorConfig
from pbd_ray.data.dataset import WindowBatch
from pbd_ray.detector.detector import Detector, DetectorOutput
from pbd_ray.metrics.cost import trainable_parameters

KEPT = (0, 2, 3)
LAYERS = ("qkv", "proj")
FACTORS = {
    f"backbone.blocks.{i}.attn.{layer}.lora_{f}.default.weight"
    for i in KEPT
    for layer in LAYERS
    for f in "AB"
}
NORMS = {f"backbone.blocks.{i}.norm{n}.{part}" for i in KEPT for n in (1, 2) for part in ("weight", "bias")}
PATCH = {"backbone.patch_embed.weight", "backbone.patch_embed.bias"}
ATTENTION_AND_MLP = {
    f"backbone.blocks.{i}.{name}"
    for i in KEPT
    for name in (
        "attn.qkv.weight", "attn.q_bias", "attn.v_bias", "attn.proj.weight", "attn.proj.bias",
        "mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias",
    )
}  # fmt: skip


def head_names() -> set[str]:
    """The head of the tiny recipe, written out: 1 stem and 2 branch layers, 3 levels, 2-layer towers."""
    layer = [f"{norm}.{part}" for norm in ("norm1", "norm2") for part in ("weight", "bias")]
    layer += ["attention_scale.scale", "mlp_scale.scale"]
    layer += [f"mlp.{index}.{part}" for index in (0, 3) for part in ("weight", "bias")]
    layer += [f"attention.{name}_conv.weight" for name in ("query", "key", "value")]
    layer += [
        f"attention.{name}.{part}"
        for name in ("query", "key", "value", "query_norm", "key_norm", "value_norm", "proj")
        for part in ("weight", "bias")
    ]
    convolution = ["conv.weight", "norm.weight", "norm.bias"]
    names = {f"{place}.{name}" for place in ("stem.0", "branch.0", "branch.1") for name in layer}
    for tower in ("embedding", "class_layers", "boundary_layers"):
        names |= {f"{tower}.{index}.{name}" for index in (0, 1) for name in convolution}
    names |= {f"level_norms.{level}.{part}" for level in range(3) for part in ("weight", "bias")}
    names |= {f"{output}_output.{part}" for output in ("class", "boundary") for part in ("weight", "bias")}
    names |= {f"boundary_scales.{level}" for level in range(3)}
    return {f"head.{name}" for name in names}


TRAINED = {
    "lora": FACTORS | NORMS | PATCH | head_names(),
    "full": NORMS | PATCH | ATTENTION_AND_MLP | head_names(),
    "lora_only": FACTORS,
    "none": set(),
}


def prepared(detector: Detector, mode: str = "lora", rank: int | None = None, seed: int = 0) -> Detector:
    config = AlignmentConfig.model_validate({"trainable": mode, "rank": rank})
    prepare_student(detector, config, torch.Generator().manual_seed(seed))
    return detector


def factors(detector: Detector) -> dict[str, nn.Parameter]:
    return {name: value for name, value in detector.named_parameters() if "lora_" in name}


def disturb(detector: Detector) -> None:
    """As if it had been trained: B is not zero any more."""
    with torch.no_grad():
        for value in factors(detector).values():
            value.add_(0.1 * torch.randn(value.shape))


@pytest.mark.parametrize("mode", TRAINED)
@pytest.mark.parametrize("unused_norm", [False, True])
def test_exactly_these_train(config: DetectorConfig, mode: str, unused_norm: bool) -> None:
    """The unused norm never does: no gradient would ever reach it."""
    backbone = config.backbone.model_copy(update={"unused_norm": unused_norm})
    detector = prepared(Detector(config.model_copy(update={"backbone": backbone}), 4, KEPT), mode)
    assert {name for name, value in detector.named_parameters() if value.requires_grad} == TRAINED[mode]


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_whatever_trains_has_a_gradient(
    make_detector: Callable[..., Detector], make_batch: Callable[..., WindowBatch], mode: str
) -> None:
    """DDP waits for every one of them."""
    detector, batch = prepared(make_detector(KEPT), mode), make_batch(2)
    output = detector.train()(batch.frames, batch.mask)
    (output.logits.square().sum() + output.offsets.sum()).backward()
    missing = {n for n, p in detector.named_parameters() if p.requires_grad and p.grad is None}
    assert missing == set()


@pytest.mark.parametrize("size", ["S", "L"])
@pytest.mark.parametrize("mode", ["lora", "full", "lora_only", "none"])
def test_counts_follow_the_formula(size: str, mode: str) -> None:
    """Real modules against `metrics.cost`; the formula counts the unused norm, as Table F does."""
    large = {"embed_dim": 1024, "depth": 24, "num_heads": 16} if size == "L" else {}
    config = DetectorConfig(backbone=BackboneConfig(unused_norm=True, **large))
    kept = range(1, config.backbone.depth, 2)
    with torch.device("meta"):
        detector = prepared(Detector(config, 20, kept), mode)
    expected = trainable_parameters(config, kept, mode)  # type: ignore[arg-type]
    counted = sum(value.numel() for value in detector.backbone.parameters() if value.requires_grad)
    assert counted == expected.total - expected.unused_norm


@pytest.mark.parametrize(
    ("mode", "millions"), [("lora", (3.11, 2.90, 2.68, 2.47)), ("full", (20.86, 19.17, 17.48, 15.79))]
)
def test_table_f(mode: str, millions: tuple[float, ...]) -> None:
    """Real modules of VideoMAE-S at 0 to 3 drops, the unused norm counted, in 2^20, truncated."""
    config = DetectorConfig(backbone=BackboneConfig(unused_norm=True))
    for drops, expected in enumerate(millions):
        with torch.device("meta"):
            backbone = prepared(Detector(config, 20, range(drops, 12)), mode).backbone
        counted = sum(v.numel() for n, v in backbone.named_parameters() if v.requires_grad or "fc_norm" in n)
        assert int(counted / 2**20 * 100) / 100 == expected


@pytest.mark.parametrize(("rank", "expected"), [(None, 96), (5, 5)])
def test_the_start_of_the_factors(rank: int | None, expected: int) -> None:
    """A ~ N(0, 1/sqrt(r)), B = 0, scale 1, on qkv and proj of every kept block."""
    kept = (0, 5, 11)
    detector = prepared(Detector(DetectorConfig(), 20, kept), rank=rank)
    found = factors(detector)
    assert len(found) == 2 * 2 * len(kept)
    for name, parameter in found.items():
        value = parameter.detach()
        outputs = 3 * 384 if ".qkv." in name else 384
        assert value.shape == ((expected, 384) if "lora_A" in name else (outputs, expected))
        if "lora_B" in name:
            assert not value.any()
        else:
            assert float(value.mean()) == pytest.approx(0, abs=5 / np.sqrt(value.numel() * expected))
            assert float(value.std()) * np.sqrt(expected) == pytest.approx(
                1, abs=5 / np.sqrt(2 * value.numel())
            )
    assert {s for m in detector.modules() for s in getattr(m, "scaling", {}).values()} == {1.0}


def test_the_start_depends_on_the_generator_alone(make_detector: Callable[..., Detector]) -> None:
    torch.manual_seed(1)
    first, other = factors(prepared(make_detector(KEPT))), factors(prepared(make_detector(KEPT), seed=1))
    torch.manual_seed(2)
    again = factors(prepared(make_detector(KEPT)))
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert all(not torch.equal(value, other[name]) for name, value in first.items() if "lora_A" in name)


def outputs(detector: Detector, batch: WindowBatch) -> DetectorOutput:
    with torch.no_grad():
        return detector(batch.frames, batch.mask)


@pytest.mark.parametrize("mode", ["lora", "full", "lora_only", "none"])
def test_adding_lora_changes_nothing(
    make_detector: Callable[..., Detector], make_batch: Callable[..., WindowBatch], mode: str
) -> None:
    detector, batch = make_detector(KEPT), make_batch(2)
    before, after = outputs(detector, batch), outputs(prepared(detector, mode), batch)
    assert torch.equal(before.logits, after.logits) and torch.equal(before.offsets, after.offsets)


def test_merging(make_detector: Callable[..., Detector], make_batch: Callable[..., WindowBatch]) -> None:
    """The output stays, the weight is W + B A by hand, and no trace of adapters remains."""
    plain, batch = make_detector(KEPT), make_batch(2)
    names = list(plain.state_dict())
    weights = {name: value.clone() for name, value in plain.state_dict().items()}
    detector = prepared(plain)
    disturb(detector)
    found = {name: value.detach().double() for name, value in factors(detector).items()}
    before = outputs(detector, batch)
    merge_lora(detector)
    after = outputs(detector, batch)
    torch.testing.assert_close(after.logits, before.logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(after.offsets, before.offsets, rtol=0, atol=1e-5)
    assert list(detector.state_dict()) == names
    assert not [m for m in detector.modules() if "lora" in type(m).__module__]
    for name, value in detector.state_dict().items():
        layer = name.removesuffix(".weight")
        if f"{layer}.lora_A.default.weight" in found:
            a, b = (found[f"{layer}.lora_{factor}.default.weight"] for factor in "AB")
            assert float((b @ a).abs().max()) > 0.01
            torch.testing.assert_close(value.double(), weights[name].double() + b @ a, rtol=0, atol=1e-6)
        else:
            assert torch.equal(value, weights[name]), name


def test_merging_without_adapters_changes_nothing(make_detector: Callable[..., Detector]) -> None:
    detector = make_detector(KEPT)
    before = {name: value.clone() for name, value in detector.state_dict().items()}
    merge_lora(detector)
    assert all(torch.equal(value, before[name]) for name, value in detector.state_dict().items())


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_merged_weight_that_is_not_finite_is_refused(
    make_detector: Callable[..., Detector], poison: float
) -> None:
    detector = prepared(make_detector(KEPT))
    with torch.no_grad():
        factors(detector)["backbone.blocks.2.attn.proj.lora_B.default.weight"][0, 0] = poison
    with pytest.raises(ValueError):
        merge_lora(detector)
