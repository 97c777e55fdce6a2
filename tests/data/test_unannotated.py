"""Files and folders as a user names them."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import pytest

from pbd_ray.config import ConfigError
from pbd_ray.data.annotations import video_file
from pbd_ray.data.unannotated import find_videos

FILES = (
    *("a.mp4", "b/a.MKV", "b/c/A.avi", "b/notes.txt", "b/.hidden.mp4", "a b$x_{.mov", "-v.mp4", "raw.bin"),
    *("走る.webm", "...mp4", f"{'x' * 80}.mp4"),
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in FILES:
        path = tmp_path / "videos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    (tmp_path / "videos" / "b" / "loop").symlink_to(tmp_path / "videos")
    return tmp_path / "videos"


@pytest.mark.parametrize(
    ("named", "expected"),
    [
        (["a.mp4"], {"a": "a.mp4"}),
        (["b"], {"a": "b/a.MKV", "A-2": "b/c/A.avi"}),
        (["b/c/A.avi", "a.mp4", "b"], {"A": "b/c/A.avi", "a-2": "a.mp4", "a-3": "b/a.MKV"}),
        (["a.mp4", "b/../a.mp4", "b/loop/a.mp4"], {"a": "a.mp4"}),
        (["raw.bin", "a b$x_{.mov"], {"raw": "raw.bin", "a_b_x": "a b$x_{.mov"}),
        (["-v.mp4", "...mp4"], {"v": "-v.mp4", "video": "...mp4"}),
        (["走る.webm", f"{'x' * 80}.mp4"], {"走る": "走る.webm", "x" * 60: f"{'x' * 80}.mp4"}),
    ],
)
def test_ids_and_files(folder: Path, named: Sequence[str], expected: dict[str, str]) -> None:
    found = find_videos([str(folder / name) for name in named])
    assert {video.id: video.path for video in found.videos} == {
        id_: str(folder / name) for id_, name in expected.items()
    }
    for video in found.videos:
        assert video_file(video, found.root) == video.path
        assert (video.frames, video.duration_seconds, len(video.labels)) == (0, 0.0, 0)


def test_a_folder_in_order_without_what_is_no_video(folder: Path) -> None:
    names = [Path(video.path).relative_to(folder).as_posix() for video in find_videos([str(folder)]).videos]
    assert names == sorted(set(FILES) - {"b/notes.txt", "b/.hidden.mp4", "raw.bin", "...mp4"}, key=Path)
    for video in find_videos([str(folder)]).videos:
        assert all(unicodedata.category(letter)[0] in "LN" or letter in "-_." for letter in video.id)


def test_files_of_two_trees_and_links(folder: Path, tmp_path: Path) -> None:
    """A link to a file keeps its own name, and what it leads to may lie anywhere."""
    links = tmp_path / "links"
    links.mkdir()
    (links / "mine.mp4").symlink_to(folder / "b" / "a.MKV")
    found = find_videos([str(links / "mine.mp4"), str(folder / "a.mp4")])
    assert (found.root, [video.id for video in found.videos]) == (str(tmp_path), ["mine", "a"])
    for video in found.videos:
        assert Path(video_file(video, found.root)).samefile(video.path)


def test_relative_names(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder / "b")
    (video,) = find_videos([os.path.join("..", "a.mp4")]).videos  # noqa: PTH118
    assert video.path == str(folder / "a.mp4")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("none.mp4", "{path}: no such video file or folder"),
        ("empty", "{path}: no video in this folder: no file ends in .mp4, .mkv, "),
    ],
)
def test_refused(folder: Path, name: str, expected: str) -> None:
    (folder / "empty").mkdir()
    with pytest.raises(ConfigError) as error:
        find_videos([str(folder / "a.mp4"), str(folder / name)])
    assert str(error.value).startswith(expected.format(path=folder / name))
