"""Bundles: what goes in comes out; what is broken is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load, save

from pbd_ray.config import BackboneConfig, DetectorConfig, GridConfig, HeadConfig
from pbd_ray.detector.bundle import (
    BundleError,
    bundle_files,
    bundle_from_files,
    load_bundle,
    save_bundle,
)
from pbd_ray.detector.detector import Detector

CONFIG = DetectorConfig(
    grid=GridConfig(window_frames=16, feature_steps=16, crop_pixels=16),
    backbone=BackboneConfig(embed_dim=16, depth=3, num_heads=2, position_table_pixels=32, unused_norm=True),
    head=HeadConfig(channels=8, num_heads=2, levels=2, regression_ranges=((0, 4), (4, 10000))),
)
CLASSES = ("Jump", "Rün")
FACTS = {"round": 2, "teacher": "abc", "map": 0.25}


@pytest.fixture
def detector() -> Detector:
    detector = Detector(CONFIG, 2, kept_blocks=[0, 2])
    detector.head.loss_normalizer.fill_(91.8)
    detector.backbone.position_table.normal_()
    return detector


@pytest.fixture
def files(detector: Detector) -> dict[str, bytes]:
    return bundle_files(detector, CLASSES, FACTS)


def test_round_trip(detector: Detector, tmp_path: Path) -> None:
    save_bundle(tmp_path / "deep" / "model", detector, CLASSES, FACTS)
    bundle = load_bundle(tmp_path / "deep" / "model")
    assert (bundle.config, bundle.classes, bundle.kept_blocks) == (CONFIG, CLASSES, (0, 2))
    assert bundle.facts == FACTS
    assert not bundle.detector.training
    ours, theirs = detector.state_dict(), bundle.detector.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    frames = torch.randint(0, 256, (1, 3, 16, 16, 16), dtype=torch.uint8)
    mask = torch.ones(1, 16, dtype=torch.bool)
    with torch.no_grad():
        a, b = detector.eval()(frames, mask, True), bundle.detector(frames, mask, True)
    assert torch.equal(a.logits, b.logits)
    assert torch.equal(a.offsets, b.offsets)
    assert list(a.block_outputs) == list(b.block_outputs) == [0, 2]


def test_equal_detectors_give_equal_bytes_without_metadata(detector: Detector, tmp_path: Path) -> None:
    save_bundle(tmp_path / "b", detector, CLASSES, FACTS)
    again = load_bundle(tmp_path / "b")
    assert bundle_files(again.detector, CLASSES, FACTS) == bundle_files(detector, CLASSES, FACTS)
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == ["config.json", "model.safetensors"]
    with safe_open(tmp_path / "b" / "model.safetensors", "pt") as file:
        assert file.metadata() is None


def test_saving_replaces_a_bundle_and_leaves_nothing_else(detector: Detector, tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    save_bundle(tmp_path / "b", detector, CLASSES, FACTS)
    save_bundle(tmp_path / "b", detector, CLASSES, {"round": 3})
    assert load_bundle(tmp_path / "b").facts == {"round": 3}
    assert [p.name for p in tmp_path.iterdir()] == ["b"]


def test_saving_refuses_what_is_not_a_bundle(detector: Detector, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("")
    for name in ("home", "file"):
        with pytest.raises(BundleError, match="exists and is not a bundle"):
            save_bundle(tmp_path / name, detector, CLASSES, FACTS)
    assert (tmp_path / "home" / "thesis.tex").read_text() == "years of work"
    with pytest.raises(BundleError, match="cannot be written"):
        save_bundle(tmp_path / "file" / "b", detector, CLASSES, FACTS)


def test_a_failed_write_keeps_the_old_bundle(
    detector: Detector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_bundle(tmp_path / "b", detector, CLASSES, FACTS)

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(BundleError, match="b: cannot be written: No space left on device"):
        save_bundle(tmp_path / "b", detector, CLASSES, {"round": 3})
    assert load_bundle(tmp_path / "b").facts == FACTS
    assert [p.name for p in tmp_path.iterdir()] == ["b"]


def test_loading_draws_no_random_numbers(files: dict[str, bytes]) -> None:
    before = torch.get_rng_state()
    bundle_from_files(files)
    assert torch.equal(torch.get_rng_state(), before)


def test_extra_tensors_and_wrong_classes_are_refused_on_writing(detector: Detector) -> None:
    with pytest.raises(BundleError, match="3 class names for a detector of 2 classes"):
        bundle_files(detector, ("a", "b", "c"), {})
    with pytest.raises(BundleError, match="facts of a bundle must be JSON"):
        bundle_files(detector, CLASSES, {"loss": float("nan")})
    detector.backbone.blocks["0"].attn.register_parameter("other", torch.nn.Parameter(torch.zeros(2)))
    with pytest.raises(BundleError, match=r"unexpected tensor 'backbone.blocks.0.attn.other'"):
        bundle_files(detector, CLASSES, {})


Files = dict[str, bytes]


def edit_config(**changes: object) -> Callable[[Files], Files]:
    def edit(files: Files) -> Files:
        config = json.loads(files["config.json"]) | changes
        return files | {"config.json": json.dumps(config).encode()}

    return edit


def edit_detector(section: str, key: str, value: object) -> Callable[[Files], Files]:
    def edit(files: Files) -> Files:
        config = json.loads(files["config.json"])
        config["detector"][section][key] = value
        return files | {"config.json": json.dumps(config).encode()}

    return edit


def edit_weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Files], Files]:
    def edit(files: Files) -> Files:
        tensors = load(files["model.safetensors"])
        change(tensors)
        return files | {"model.safetensors": save(tensors)}

    return edit


def without(name: str) -> Callable[[Files], Files]:
    return lambda files: {key: value for key, value in files.items() if key != name}


Q = "backbone.blocks.0.attn.q_bias"
BROKEN = [
    (without("config.json"), "B: config.json is missing"),
    (without("model.safetensors"), "B: model.safetensors is missing"),
    (lambda f: f | {"config.json": b"{"}, "B/config.json: not JSON"),
    (lambda f: f | {"config.json": b"\xff\xfe"}, "B/config.json: not JSON"),
    (lambda f: f | {"config.json": b"[]"}, "B/config.json: expected an object"),
    (edit_config(format_version=2), "format_version 2 is unknown, this release reads 1"),
    (edit_config(classes="Jump"), "classes is missing or not list"),
    (edit_config(classes=["Jump", 3]), "classes holds 3, expected str"),
    (edit_config(classes=[]), "num_classes 0 must be at least 1"),
    (edit_config(kept_blocks=[0, True]), "kept_blocks holds True, expected int"),
    (edit_config(kept_blocks=[2, 0]), "must be ascending original indices of 3 blocks"),
    (edit_config(kept_blocks=[0, 1]), "tensor 'backbone.blocks.1.attn.proj.bias' is missing"),
    (edit_config(facts=None), "facts is missing or not dict"),
    (edit_config(extra=1), "unknown key 'extra'"),
    (edit_detector("backbone", "depth", "many"), "detector.backbone.depth: "),
    (edit_detector("backbone", "wings", 2), "unknown key 'detector.backbone.wings'"),
    (edit_detector("head", "num_heads", 3), "detector.head: channels 8 is not a multiple of num_heads 3"),
    (edit_detector("backbone", "position_table_pixels", 24), "24 is not a multiple of patch_pixels 16"),
    (edit_detector("backbone", "embed_dim", 32), "has shape"),
    (lambda f: f | {"model.safetensors": b"junk"}, "B/model.safetensors: not a safetensors file"),
    (edit_weights(lambda t: t.pop(Q)), f"tensor '{Q}' is missing"),
    (edit_weights(lambda t: t.update(other=torch.zeros(1))), "unexpected tensor 'other'"),
    (edit_weights(lambda t: t.update({Q: torch.zeros(3)})), f"'{Q}' has shape [3], expected [16]"),
    (edit_weights(lambda t: t.update({Q: torch.zeros(16, dtype=torch.int32)})), "dtype torch.int32"),
    (edit_weights(lambda t: t.update({Q: torch.full((16,), torch.nan)})), "are not finite"),
]


@pytest.mark.parametrize(("damage", "message"), BROKEN, ids=[message[:40] for _, message in BROKEN])
def test_a_broken_bundle_is_one_clear_line(
    files: Files, damage: Callable[[Files], Files], message: str
) -> None:
    with pytest.raises(BundleError) as error:
        bundle_from_files(damage(files), "B")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_directory_and_file(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="nowhere: no such bundle directory"):
        load_bundle(tmp_path / "nowhere")
    with pytest.raises(BundleError, match=r"config.json is missing"):
        load_bundle(tmp_path)
