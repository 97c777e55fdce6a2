"""Which videos a run uses, in this process; the same through tasks: tests/integration/test_preflight.py."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pbd_ray.cluster.preflight import usable_videos
from pbd_ray.config import Recipe, UserError, load_recipe
from pbd_ray.data import synthetic
from pbd_ray.data.annotations import AnnotationError
from pbd_ray.data.quarantine import NOTHING, QuarantineError
from pbd_ray.data.source import load_split


@pytest.fixture
def data(tiny_recipe: str, video_cache: Path, tmp_path: Path) -> Path:
    config = load_recipe(tiny_recipe).experiment.data.synthetic
    assert config is not None
    return Path(shutil.copytree(synthetic.ensure(config, video_cache), tmp_path / "videos"))


@pytest.fixture
def own(tiny_recipe: str, data: Path) -> Callable[..., Recipe]:
    """own("key=value", ...) -> a recipe that reads `data` as a user's files."""

    def make(*overrides: str) -> Recipe:
        files = ["experiment.data.source=files", "experiment.data.synthetic=null", "backend=local"]
        paths = [f"data_root={data}", f"annotations={data / 'annotations.json'}"]
        return load_recipe(tiny_recipe, [*files, *paths, *overrides])

    return make


def test_all_are_good(own: Callable[..., Recipe], data: Path) -> None:
    recipe = own()
    whole = load_split(recipe, print)
    split, source, left_out = usable_videos(recipe, whole)
    assert (left_out, source.data_root) == (NOTHING, str(data))
    assert [video.id for video in split.everything().videos] == [
        video.id for video in whole.everything().videos
    ]


def test_bad_ones_are_left_out_for_good(
    own: Callable[..., Recipe], data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first start decides; a later one goes on with its list, whatever the files are like by then."""
    recipe = own("experiment.data.max_quarantined=0.2")
    whole, bad = load_split(recipe, print), data / "fit_0000.mp4"
    good = bad.read_bytes()
    bad.write_bytes(b"")
    split, _, first = usable_videos(recipe, whole)
    reason = f"{bad}: the video file is empty (0 bytes)"
    assert dict(first.reasons) == {"fit_0000": reason}
    assert {video.id for video in whole.fit.videos} - {video.id for video in split.fit.videos} == {"fit_0000"}
    said = capsys.readouterr().out
    assert f"quarantined fit_0000: {reason}" in said
    assert "quarantined: 1 videos (16.7% of fit); no candidate sees them" in said

    bad.write_bytes(good)
    again, _, second = usable_videos(recipe, whole, first)
    assert second == first
    assert "fit_0000" not in {video.id for video in again.fit.videos}
    assert (
        "video fit_0000 can be used now, but the run began without it: it stays out"
        in capsys.readouterr().out
    )

    (data / "test_0001.mp4").unlink()
    with pytest.raises(UserError) as error:
        usable_videos(recipe, whole, first)
    assert str(error.value) == (
        f"{data}: no file for video 'test_0001': tried test_0001.mp4 and "
        "[v_]test_0001{.mp4,.mkv,.avi,.webm}; "
        "the run began with this video and cannot go on without it"
    )


def test_fewer_videos_than_training_workers(own: Callable[..., Recipe]) -> None:
    """A rank without a window would fail after scoring."""
    batches = [f"{part}.optimizer.batch_size=7" for part in ("teacher", "alignment")]
    recipe = own("train_workers=7", *batches)
    with pytest.raises(UserError, match=r"^execution\.train_workers 7 is more than the 6 fit videos$"):
        usable_videos(recipe, load_split(recipe, print))


def test_too_many(own: Callable[..., Recipe], data: Path) -> None:
    (data / "fit_0003.mp4").unlink()
    recipe = own()
    with pytest.raises(QuarantineError, match=r"^1 of 6 fit videos \(16\.7%\) cannot be used, over "):
        usable_videos(recipe, load_split(recipe, print))


def test_a_video_outside_of_the_root(own: Callable[..., Recipe], data: Path) -> None:
    """Refused, however many may be quarantined."""
    recipe, video = own("experiment.data.max_quarantined=1"), data / "fit_0003.mp4"
    elsewhere = video.rename(data.parent / "elsewhere.mp4")
    annotations = data / "annotations.json"
    annotations.write_text(annotations.read_text().replace('"fit_0003.mp4"', f'"{elsewhere}"'))
    with pytest.raises(AnnotationError, match=r"outside of execution\.data_root"):
        usable_videos(recipe, load_split(recipe, print))


def test_frames_that_are_not_annotated(own: Callable[..., Recipe], data: Path) -> None:
    text = (data / "annotations.json").read_text().replace('"frame"', '"ignored"').replace('"fps"', '"too"')
    recipe = own()
    annotated = load_split(recipe, print)
    (data / "annotations.json").write_text(text)
    split, _, left_out = usable_videos(recipe, load_split(recipe, print))
    assert left_out == NOTHING
    assert [(video.frames, video.fps) for video in split.fit.videos] == [
        (video.frames, video.fps) for video in annotated.fit.videos
    ]
