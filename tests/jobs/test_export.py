"""jobs/export.py: exports that are what their certificates say, and nothing where they are not."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pbd_ray.compression.blocks import from_detector, to_detector, without_block
from pbd_ray.compression.scoring import detect_video
from pbd_ray.data.annotations import load_annotations
from pbd_ray.data.source import VideoSource
from pbd_ray.detector.bundle import load_bundle, save_bundle
from pbd_ray.detector.detector import Detector
from pbd_ray.detector.export.formats import FORMATS
from pbd_ray.detector.opentad import load_opentad
from pbd_ray.search.hashing import bytes_hash, weights_hash

RunJob = Callable[..., Any]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped teacher less two blocks."""
    teacher = load_bundle(str(resources.files("pbd_ray") / "demo_teacher"))
    model = without_block(without_block(from_detector(teacher.detector), 2), 4)
    folder = tmp_path_factory.mktemp("bundles") / "demo"
    save_bundle(folder, to_detector(model, teacher.config, 4), teacher.classes, teacher.facts)
    return folder


def export(run_job: RunJob, bundle: Path, formats: str, output: Path, *recipe: str) -> Any:
    return run_job(
        "export.py", "--bundle", str(bundle), "--format", formats, "--output", str(output), *recipe
    )


def certificate(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "certificate.json").read_text())
    return content


def run_snippet(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The code in the card, in the folder, as a reader would paste it."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    exec(code, names)
    return names


def test_without_a_recipe(
    demo: Path, tmp_path: Path, run_job: RunJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the demo, twice into the same place."""
    for _ in range(2):
        outcome = export(run_job, demo, "safetensors,opentad", tmp_path / "out")
        assert outcome.status == 0, outcome.err
    assert "largest differences from the bundle, on random pixels, seed 0" in outcome.out
    assert sorted(path.name for path in tmp_path.rglob("*")) == sorted(
        [
            *("out", "safetensors", "opentad", *["README.md", "certificate.json"] * 2),
            *("config.json", "model.safetensors", "config.py", "checkpoint.pth", "category_idx.txt"),
        ]
    )
    bundle, written = load_bundle(demo), load_bundle(tmp_path / "out" / "safetensors")
    assert written.kept_blocks == (0, 1, 2, 3, 4, 5) and written.config.backbone.depth == 6
    digest = weights_hash(from_detector(bundle.detector).weights)
    origin = {"weights": digest, "depth": 8, "kept_blocks": [0, 1, 3, 5, 6, 7]}
    assert written.facts == {**bundle.facts, "exported_from": origin}
    for name in ("safetensors", "opentad"):
        folder = tmp_path / "out" / name
        found = certificate(folder)
        assert (found["format"], found["bundle"]) == (name, digest)
        assert found["kept_blocks"] == [0, 1, 3, 5, 6, 7]
        assert found["largest_difference"] == {"logits": 0.0, "offsets": 0.0}
        assert (found["windows"], found["detections"]) == (2, None)
        files = {path.name for path in folder.iterdir()} - {"certificate.json"}
        assert found["files"] == {file: bytes_hash((folder / file).read_bytes()) for file in sorted(files)}
        card = (folder / "README.md").read_text()
        assert "Blocks: 6 of 8, dropped: 2, 4 (numbered from 0)." in card
        assert "| classes, in label order | fall, grow, rise, shrink |" in card
        assert (
            f"| parameters of the whole detector | {sum(p.numel() for p in bundle.detector.parameters()):,} |"
            in card
        )
        assert "0.9030 at tIoU 0.5" in card and digest in card
    assert run_snippet(tmp_path / "out" / "safetensors", monkeypatch)["output"].logits.shape == (1, 248, 4)
    state = run_snippet(tmp_path / "out" / "opentad", monkeypatch)["state"]
    assert len(state) == len(bundle.detector.state_dict()) + 2  # OpenTAD's unused norm


def test_on_selection_videos(
    tiny_recipe: str,
    bundle: Path,
    videos: Path,
    video_cache: Path,
    tmp_path: Path,
    run_job: RunJob,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All formats that one detector can have; on the recipe's videos that choose, whatever logs its runs."""
    recipe = [tiny_recipe, f"cache_dir={video_cache}", "execution.loggers=[tensorboard]"]
    outcome = export(run_job, bundle, ",".join(FORMATS), tmp_path, *recipe)
    assert outcome.status == 0, outcome.err
    ours = load_bundle(bundle)
    device, source = torch.device("cpu"), VideoSource(str(videos))
    selection = load_annotations(videos / "annotations.json").subset("selection").videos
    tables = [detect_video(ours.detector, video, source, 2, device) for video in selection]
    for name, format in FORMATS.items():
        found = certificate(tmp_path / name)
        detections, difference = found["detections"], found["largest_difference"]
        assert found["compared_on"] == "selection videos"
        assert detections["videos"] == len(selection) == 3
        assert detections["bundle"] == sum(table.num_rows for table in tables)
        assert list(detections["bundle_map"]) == ["0.3", "0.4", "0.5", "0.6", "0.7"]
        assert difference["logits"] <= format.tolerance.logits
        assert found["versions"].keys() == {"pbd_ray", *format.packages}
        if name != "onnx":
            assert set(difference.values()) == {0.0}
            assert detections["export"] == detections["bundle"]
            assert detections["export_map"] == detections["bundle_map"]
    again = export(run_job, tmp_path / "safetensors", "safetensors", tmp_path / "again")
    assert again.status == 0, again.err
    card, other = (
        (tmp_path / place / "README.md").read_text() for place in ("safetensors", "again/safetensors")
    )
    assert "Blocks: 3 of 4, dropped: 2" in card  # an export of an export knows where it comes from
    assert other.split("| weights")[0] == card.split("| weights")[0]
    plain = load_bundle(tmp_path / "safetensors")
    again = Detector(plain.config, 4).eval()
    load_opentad(again, tmp_path / "opentad" / "checkpoint.pth")
    for video, table in zip(selection, tables, strict=True):
        assert detect_video(again, video, source, 2, device).equals(table)
    shapes = {name: run_snippet(tmp_path / name, monkeypatch) for name in ("onnx", "huggingface")}
    assert shapes["onnx"]["scores"].shape == (1, 56, 4)
    with torch.no_grad():
        frames = shapes["huggingface"]["frames"].transpose(1, 2)
        tokens = ours.detector.backbone.embed(frames)
        for index in ours.kept_blocks:
            tokens = ours.detector.backbone.run_block(index, tokens)
    torch.testing.assert_close(shapes["huggingface"]["tokens"], tokens, rtol=1e-4, atol=1e-4)


def test_an_export_that_is_not_the_bundle(
    demo: Path, tmp_path: Path, run_job: RunJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of any format is left, and what was there is there still."""
    assert export(run_job, demo, "opentad", tmp_path / "out").status == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    honest = FORMATS["safetensors"]

    def write(bundle: Any, folder: Path) -> None:
        honest.write(bundle, folder)
        tensors = load_file(folder / "model.safetensors")
        tensors["head.class_output.bias"][0] += 0.5
        save_file(tensors, folder / "model.safetensors")

    monkeypatch.setitem(FORMATS, "safetensors", replace(honest, write=write))
    outcome = export(run_job, demo, "opentad,safetensors", tmp_path / "out")
    assert outcome.status == 1
    assert outcome.err == (
        "error: safetensors: logits differ by up to 0.5 from the bundle's, over 0; nothing is written\n"
    )
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"format": "onnx,tensorflow"}, "--format onnx,tensorflow: 'tensorflow' is not one of safetensors, "),
        ({"format": ""}, "--format : '' is not one of"),
        ({"bundle": "nowhere"}, "nowhere: no such bundle directory"),
        (
            {"bundle": "{lora}"},
            "model.safetensors: tensor 'backbone.blocks.0.attn.qkv.lora_A.default.weight'",
        ),
        ({"format": "huggingface"}, "huggingface: backbone.position_table is up to"),
        ({"output": "{theirs}"}, "opentad is there and is no export"),
        ({"output": "{file}"}, "file is not a directory"),
        ({"recipe": "nosuch"}, "recipe 'nosuch' is neither"),
        ({"recipe": "{recipe}"}, "grid.window_frames is 128, experiment.detector.grid.window_frames is 32"),
    ],
)
def test_refused(
    changes: dict[str, str], expected: str, demo: Path, tiny_recipe: str, tmp_path: Path, run_job: RunJob
) -> None:
    """One line, status 2, nothing written."""
    (tmp_path / "theirs" / "opentad").mkdir(parents=True)
    (tmp_path / "theirs" / "opentad" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("")
    places = {name: str(tmp_path / name) for name in ("theirs", "file", "lora")} | {"recipe": tiny_recipe}
    save_bundle(places["lora"], load_bundle(demo).detector, load_bundle(demo).classes, {})
    weights = Path(places["lora"], "model.safetensors")
    factor = {"backbone.blocks.0.attn.qkv.lora_A.default.weight": torch.zeros(20, 80)}
    save_file(load_file(weights) | factor, weights)
    before = sorted(tmp_path.rglob("*"))
    given = {"bundle": str(demo), "format": "opentad", "output": str(tmp_path / "out")} | {
        key: value.format(**places) for key, value in changes.items()
    }
    recipe = [given["recipe"]] if "recipe" in given else []
    outcome = export(run_job, Path(given["bundle"]), given["format"], Path(given["output"]), *recipe)
    assert outcome.status == 2
    assert outcome.err.startswith("error: ") and outcome.err.count("\n") == 1
    assert expected in outcome.err
    assert sorted(tmp_path.rglob("*")) == before


def test_onnx_without_its_packages(
    demo: Path, tmp_path: Path, run_job: RunJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    outcome = export(run_job, demo, "safetensors,onnx", tmp_path / "out")
    assert outcome.status == 2
    assert outcome.err == "error: onnx: onnxruntime is not installed: pip install 'pbd_ray[export]'\n"
    assert not (tmp_path / "out").exists()
