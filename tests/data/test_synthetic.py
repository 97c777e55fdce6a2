"""The embedded data set: exact, repeatable, and with classes that only motion tells apart."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import av
import decord
import numpy as np
import pytest

from pbd_ray.config import SyntheticConfig
from pbd_ray.data import synthetic
from pbd_ray.data.annotations import load_annotations
from pbd_ray.data.synthetic import CLASSES, DISTRACTORS, SUBSETS, Scene, SyntheticError

# 40 pixels: decord takes the row padding for channels at some widths (16, 24, 32, 48, 96; dmlc/decord#336).
SMALL = SyntheticConfig(
    fit_videos=3,
    selection_videos=1,
    test_videos=2,
    short_side_pixels=40,
    fps=10,
    min_duration_seconds=6,
    max_duration_seconds=9,
)
VIDEOS = 6
DEFAULT = SyntheticConfig()


def pixel_hash(drawn: Scene) -> str:
    digest = hashlib.sha256()
    for frame in range(drawn.frames):
        digest.update(synthetic.render(drawn, frame).tobytes())
    return digest.hexdigest()


def file_hashes(root: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(root.iterdir())}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("synthetic")
    synthetic.generate(root, SMALL)
    return root


@pytest.fixture(scope="module")
def default_scenes() -> dict[str, list[Scene]]:
    counts = {"fit": DEFAULT.fit_videos, "selection": DEFAULT.selection_videos, "test": DEFAULT.test_videos}
    return {subset: [synthetic.scene(DEFAULT, subset, i) for i in range(n)] for subset, n in counts.items()}


def unit_state(drawn: Scene) -> np.ndarray:
    """The actor's (x, y, size), each scaled to [0, 1): (frames, 3)."""
    low, high = synthetic._RADIUS
    return np.stack([drawn.actor_x, drawn.actor_y, (drawn.actor_size - low) / (high - low)], axis=1)


def frame_kinds(drawn: Scene) -> np.ndarray:
    """Label of every frame; -1 in the background."""
    kinds = np.full(drawn.frames, -1)
    for (start, end), label in zip(drawn.segments, drawn.labels, strict=True):
        kinds[start:end] = label
    return kinds


# --- what is drawn -----------------------------------------------------------------------------------


def test_default_set_is_large_enough_and_balanced(default_scenes: dict[str, list[Scene]]) -> None:
    assert len(default_scenes["test"]) >= 40
    assert sum(len(s.labels) for s in default_scenes["test"]) >= 200
    for scenes in default_scenes.values():
        counts = np.bincount(np.concatenate([s.labels for s in scenes]), minlength=len(CLASSES))
        assert counts.max() <= 1.35 * counts.min(), counts
        assert all(len(s.labels) for s in scenes)
    passive = [s.passive is not None for scenes in default_scenes.values() for s in scenes]
    assert 0.2 < np.mean(passive) < 0.4  # drawn with probability 0.3


def test_timeline_covers_the_video_and_actions_are_apart(default_scenes: dict[str, list[Scene]]) -> None:
    for drawn in default_scenes["test"]:
        assert drawn.timeline[0].start == 0
        assert drawn.timeline[-1].end == drawn.frames
        assert all(a.end == b.start for a, b in zip(drawn.timeline, drawn.timeline[1:], strict=False))
        assert drawn.timeline[0].kind in DISTRACTORS
        assert drawn.timeline[-1].kind in DISTRACTORS
        lengths = np.diff(drawn.segments, axis=1) / drawn.fps
        assert np.all((lengths >= 1.15) & (lengths <= 4.55))
        assert np.all(drawn.segments[1:, 0] - drawn.segments[:-1, 1] >= drawn.fps)


def test_no_sprite_jumps_at_a_boundary(default_scenes: dict[str, list[Scene]]) -> None:
    """Between frames the actor moves at most by the fastest motion (modulo wrap); only jitter jumps."""
    for drawn in default_scenes["test"]:
        steps = np.abs((np.diff(unit_state(drawn), axis=0) + 0.5) % 1.0 - 0.5)
        jitter = np.zeros(drawn.frames, bool)
        for motion in drawn.timeline:
            jitter[motion.start : motion.end] = motion.kind == "jitter"
        fastest = 2 * np.pi * 0.25 / (0.8 * drawn.fps)  # sway at its centre
        assert steps[~jitter[1:]].max() <= fastest


def test_subsets_and_seeds_draw_different_videos() -> None:
    scenes = [synthetic.scene(SMALL, subset, i) for subset in SUBSETS for i in range(3)]
    scenes.append(synthetic.scene(SMALL.model_copy(update={"seed": 1}), "fit", 0))
    assert len({pixel_hash(drawn) for drawn in scenes}) == len(scenes)


def test_pixels_depend_on_seed_subset_and_index_alone() -> None:
    larger = SMALL.model_copy(update={"fit_videos": 50, "test_videos": 7})
    assert pixel_hash(synthetic.scene(SMALL, "test", 1)) == pixel_hash(synthetic.scene(larger, "test", 1))


def test_sprite_stands_out(default_scenes: dict[str, list[Scene]]) -> None:
    """Without the actor the pixels under its centre are far brighter or darker, in every video."""
    luma = np.array([0.299, 0.587, 0.114])
    for drawn in default_scenes["test"][:20]:
        lone = replace(drawn, passive=None)
        hidden = replace(lone, actor=replace(drawn.actor, size=np.full(drawn.frames, 1e-3)))
        for frame in range(0, drawn.frames, 50):
            row, column = int(drawn.actor_y[frame] * 48), int(drawn.actor_x[frame] * 48)
            here, gone = (synthetic.render(s, frame)[row, column] @ luma for s in (lone, hidden))
            assert abs(here - gone) > 30


@pytest.mark.parametrize("shape", ["disc", "square", "diamond"])
def test_sprite_is_painted_where_the_state_says(shape: str) -> None:
    drawn = synthetic.scene(DEFAULT, "fit", 0)
    black = replace(drawn, backdrop=np.zeros_like(drawn.backdrop), passive=None)
    white = np.full(3, 255, np.float32)
    for x, y, size in ((0.5, 0.5, 0.2), (0.25, 0.7, 0.12), (0.5, 0.02, 0.2)):
        frames = {
            "x": np.full(drawn.frames, x),
            "y": np.full(drawn.frames, y),
            "size": np.full(drawn.frames, size),
        }
        actor = replace(drawn.actor, **frames, shape=shape, colour=white, texture=(0.0, 0.0, 0.0))
        mask = synthetic.render(replace(black, actor=actor), 0)[..., 0] / 255
        assert mask.sum() == pytest.approx(np.pi * (size * 48) ** 2, rel=0.1)  # also across the wrap
        if y > 0.3:
            rows, columns = np.indices(mask.shape) + 0.5
            assert (mask * columns).sum() / mask.sum() == pytest.approx(x * 48, abs=0.3)
            assert (mask * rows).sum() / mask.sum() == pytest.approx(y * 48, abs=0.3)


# --- only motion tells the classes apart -------------------------------------------------------------


def kolmogorov_smirnov(a: np.ndarray, b: np.ndarray) -> float:
    """Two-sample KS statistic: the largest distance between the empirical distribution functions."""
    grid = np.sort(np.concatenate([a, b]))
    below_a = np.searchsorted(np.sort(a), grid, side="right") / len(a)
    below_b = np.searchsorted(np.sort(b), grid, side="right") / len(b)
    return float(np.abs(below_a - below_b).max())


def many_frames(subset: str, videos: int, lag: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """States of every 5th frame whose frame `lag` before lies in the same segment, and their kinds.

    With a lag: the wrapped difference of the states instead.
    """
    states, kinds = [], []
    for index in range(videos):
        drawn = synthetic.scene(DEFAULT.model_copy(update={"seed": 11}), subset, index)
        unit, label = unit_state(drawn), frame_kinds(drawn)
        for motion in drawn.timeline:
            at = np.arange(motion.start + lag, motion.end, 5)
            states.append((unit[at] - unit[at - lag] + 0.5) % 1.0 - 0.5 if lag else unit[at])
            kinds.append(label[at])
    return np.concatenate(states), np.concatenate(kinds)


def quadratic(features: np.ndarray) -> np.ndarray:
    """1, every feature, every product of two."""
    ones = np.concatenate([np.ones((len(features), 1)), features], axis=1)
    rows, columns = np.triu_indices(ones.shape[1])
    products: np.ndarray = ones[:, rows] * ones[:, columns]
    return products


def fitted_accuracy(train: tuple[np.ndarray, np.ndarray], test: tuple[np.ndarray, np.ndarray]) -> float:
    """Least-squares one-against-all on the training frames; mean class accuracy on the test frames."""
    classes = np.unique(train[1])
    targets = (train[1][:, None] == classes).astype(float)
    targets /= targets.mean(axis=0)  # classes weigh the same
    gram = train[0].T @ train[0] / len(train[0])
    ridge = 1e-3 * np.trace(gram) / len(gram) * np.eye(len(gram))
    weights = np.linalg.solve(gram + ridge, train[0].T @ targets / len(targets))
    guess = classes[np.argmax(test[0] @ weights, axis=1)]
    return float(np.mean([np.mean(guess[test[1] == c] == c) for c in classes]))


def test_single_frame_states_have_one_distribution() -> None:
    """One frame a class and video, so that samples are independent and KS critical values hold."""
    rng = np.random.default_rng(0)
    samples: dict[int, list[np.ndarray]] = {kind: [] for kind in range(-1, len(CLASSES))}
    for index in range(1600):
        drawn = synthetic.scene(DEFAULT.model_copy(update={"seed": 11}), "fit", index)
        unit, label = unit_state(drawn), frame_kinds(drawn)
        for kind, sample in samples.items():
            at = np.flatnonzero(label == kind)
            if len(at):
                sample.append(unit[rng.choice(at)])
    states = [np.stack(sample) for sample in samples.values()]
    uniform = np.linspace(0, 1, 100_000)
    critical = 2.23  # times sqrt(1/n + 1/m): level 1e-4 for each of the 45 comparisons
    for i, a in enumerate(states):
        assert len(a) > 1000
        for column, name in enumerate(("x", "y", "size")):
            assert kolmogorov_smirnov(a[:, column], uniform) < critical / np.sqrt(len(a)) < 0.07, (name, i)
            for j, b in enumerate(states[:i]):
                level = critical * np.sqrt(1 / len(a) + 1 / len(b))
                assert kolmogorov_smirnov(a[:, column], b[:, column]) < level, (name, i, j)


@pytest.mark.parametrize("with_background", [False, True])
def test_one_frame_is_chance_and_motion_is_not(with_background: bool) -> None:
    lowest = -1 if with_background else 0

    def chosen(subset: str, lag: int) -> tuple[np.ndarray, np.ndarray]:
        features, kinds = many_frames(subset, 300, lag)
        return quadratic(features[kinds >= lowest]), kinds[kinds >= lowest]

    chance = 1 / (len(CLASSES) - lowest)
    assert abs(fitted_accuracy(chosen("fit", 0), chosen("test", 0)) - chance) < 0.04
    moving = fitted_accuracy(chosen("fit", 5), chosen("test", 5))
    # Jumps and sway of the background may look like an action for 5 frames.
    assert moving > (0.8 if with_background else 0.9)


def test_one_frame_of_pixels_is_chance() -> None:
    def pixels(subset: str, videos: int) -> tuple[np.ndarray, np.ndarray]:
        images, kinds = [], []
        for index in range(videos):
            drawn = synthetic.scene(DEFAULT, subset, index)
            label = frame_kinds(drawn)
            for frame in np.flatnonzero(label >= 0)[::10]:
                coarse = synthetic.render(drawn, int(frame)).reshape(8, 6, 8, 6, 3).mean(axis=(1, 3))
                images.append(np.append(coarse.ravel() / 128 - 1, 1.0))
                kinds.append(label[frame])
        return np.array(images), np.array(kinds)

    assert abs(fitted_accuracy(pixels("fit", 96), pixels("test", 48)) - 1 / len(CLASSES)) < 0.07


# --- what is written ---------------------------------------------------------------------------------


def test_files_decode_to_what_is_declared(small: Path) -> None:
    found = load_annotations(small / "annotations.json")
    assert len(found.videos) == VIDEOS
    for video in found.videos:
        reader = decord.VideoReader(str(small / video.path))
        subset, index = video.id.split("_")
        drawn = synthetic.scene(SMALL, subset, int(index))
        assert len(reader) == video.frames == drawn.frames
        assert reader.get_avg_fps() == pytest.approx(video.fps) == SMALL.fps
        pixels = reader.get_batch([0, drawn.frames // 2, drawn.frames - 1]).asnumpy().astype(int)
        assert pixels.shape == (3, 40, 40, 3)
        for got, frame in zip(pixels, (0, drawn.frames // 2, drawn.frames - 1), strict=True):
            assert np.abs(got - synthetic.render(drawn, frame)).mean() < 5


def test_annotations_are_the_scenes(small: Path) -> None:
    found = load_annotations(small / "annotations.json", classes=CLASSES)
    assert found.classes == CLASSES
    by_id = {video.id: video for video in found.videos}
    assert {v.subset for v in found.videos} == set(SUBSETS)
    for expected in synthetic.annotate(SMALL).videos:
        video = by_id[expected.id]
        subset, index = video.id.split("_")
        drawn = synthetic.scene(SMALL, subset, int(index))
        np.testing.assert_array_equal(np.rint(video.segments_seconds * video.fps), drawn.segments)
        np.testing.assert_array_equal(video.segments_seconds, expected.segments_seconds)
        np.testing.assert_array_equal(video.labels, drawn.labels)
        assert video.duration_seconds == expected.duration_seconds == drawn.frames / SMALL.fps
        assert (video.path, video.subset, video.frames) == (expected.path, subset, drawn.frames)


def test_two_processes_write_the_same_bytes(small: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    root = synthetic.ensure(SMALL, tmp_path, lambda done, total: seen.append((done, total)), processes=2)
    assert root == tmp_path / f"synthetic-{synthetic.config_hash(SMALL)[:8]}"
    assert seen == [(done, VIDEOS) for done in range(VIDEOS + 1)]
    assert file_hashes(root) == file_hashes(small)  # and no partial file is left


def test_done_is_done_and_what_is_lost_comes_back(small: Path, tmp_path: Path) -> None:
    synthetic.generate(tmp_path, SMALL)
    before = file_hashes(tmp_path)
    times = {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    seen: list[tuple[int, int]] = []

    def watch(done: int, total: int) -> None:
        seen.append((done, total))

    synthetic.generate(tmp_path, SMALL, watch)
    assert not seen
    assert times == {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()}

    (tmp_path / "fit_0001.mp4").unlink()
    (tmp_path / "test_0000.mp4").write_bytes(b"cut short")
    synthetic.generate(tmp_path, SMALL, watch)
    assert seen == [(4, 6), (5, 6), (6, 6)]
    assert file_hashes(tmp_path) == before

    (tmp_path / "manifest.json").unlink()  # stopped before the end
    (tmp_path / "selection_0000.mp4").unlink()
    synthetic.generate(tmp_path, SMALL)
    (tmp_path / "annotations.json").unlink()
    synthetic.generate(tmp_path, SMALL)
    assert file_hashes(tmp_path) == before


def test_colours_are_those_of_ffmpeg() -> None:
    """One even colour a picture: ffmpeg sites chroma elsewhere, which only shows at edges."""
    colours = np.random.default_rng(0).integers(0, 256, (50, 3), dtype=np.uint8)
    for colour in colours:
        pixels = np.broadcast_to(colour, (16, 16, 3)).copy()
        theirs = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format="yuv420p").to_ndarray()
        assert np.abs(synthetic._yuv420(pixels).astype(int) - theirs).max() <= 1


@pytest.mark.parametrize("lost", [None, "manifest.json", "annotations.json"])
def test_another_configs_directory_is_refused(small: Path, tmp_path: Path, lost: str | None) -> None:
    for name in ("manifest.json", "annotations.json"):
        if name != lost:
            (tmp_path / name).write_bytes((small / name).read_bytes())
    before = file_hashes(tmp_path)
    with pytest.raises(SyntheticError, match="another data set") as caught:
        synthetic.generate(tmp_path, SMALL.model_copy(update={"seed": 5}))
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert file_hashes(tmp_path) == before


def test_a_strangers_annotations_are_refused(tmp_path: Path) -> None:
    (tmp_path / "annotations.json").write_text(json.dumps({"database": {}}))
    with pytest.raises(SyntheticError, match="another data set"):
        synthetic.generate(tmp_path, SMALL)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("seed", -1),
        ("short_side_pixels", 41),
        ("short_side_pixels", 8),
        ("fps", 4),
        ("min_duration_seconds", 3.0),
        ("max_duration_seconds", 5.5),
    ],
)
def test_impossible_configurations_are_named(tmp_path: Path, field: str, value: float) -> None:
    with pytest.raises(SyntheticError, match=rf"data\.synthetic\.{field} {value}: "):
        synthetic.generate(tmp_path / "new", SMALL.model_copy(update={field: value}))
    assert not (tmp_path / "new").exists()
