"""Who trains, chooses and tests, by the names that people give their subsets."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from pbd_ray.data.annotation_forms import Written, read_written
from pbd_ray.data.json_file import AnnotationError
from pbd_ray.data.subsets import assign_subsets, hashed_subset


def written(tmp_path: Path, subsets: str) -> Written:
    """A video a word of `subsets`; one in brackets has no instances, `-` has no subset."""
    rows = []
    for number, word in enumerate(subsets.split()):
        name = word.strip("()-")
        instance = "Run,0,1" if "(" not in word else ",,"
        rows.append(f"{name or 'none'}{number},{instance},{name}")
    (tmp_path / "own.csv").write_text("\n".join(["video,label,start,end,subset", *rows, ""]))
    return read_written(tmp_path / "own.csv")


@pytest.mark.parametrize(
    ("subsets", "named", "roles"),
    [
        ("train test", (), "training validation"),
        ("training validation", (), "training validation"),
        ("training validation (testing)", (), "training validation -"),  # ActivityNet
        ("val test", (), "training validation"),  # THUMOS14
        ("Train Val Test", (), "training selection validation"),
        ("training selection validation", (), "training selection validation"),
        ("one two three", ("two",), "training validation training"),
        ("one two three", ("two", "three"), "training validation validation"),
        ("train test train (train)", (), "training validation training training"),
        ("train test -", (), "training validation -"),
        ("Train test Test train", (), "training validation validation training"),
    ],
)
def test_roles(subsets: str, named: tuple[str, ...], roles: str, tmp_path: Path) -> None:
    given = written(tmp_path, subsets)
    assigned = assign_subsets(given, "own.csv", named)
    assert " ".join(assigned.subsets.get(video.id, "-") for video in given.videos) == roles


def test_what_is_left_out_is_said(tmp_path: Path) -> None:
    assigned = assign_subsets(written(tmp_path, "train val - (testing)"), "own.csv")
    (problem,) = assigned.problems
    line = f"{tmp_path / 'own.csv'}: line 4, subset: empty, though other videos have one; 'none2' is left out"
    assert problem.line == line
    assert assigned.notes == (
        "subset 'train' becomes training",
        "subset 'val' becomes validation",
        "subset 'testing': no instances, 1 videos left out",
    )


def test_without_subsets_a_hash_draws(tmp_path: Path) -> None:
    """By the id alone, about a fifth."""
    assigned = assign_subsets(written(tmp_path, "- - - - - - - -"), "own.csv")
    assert len(assigned.subsets) == 8
    assert "a hash of its id puts 20% of the videos into validation" in assigned.notes[0]
    ids = [f"v{number}" for number in range(2000)]
    drawn = [id_ for id_ in ids if hashed_subset(id_) == "validation"]
    assert drawn == [id_ for id_ in ids if int(hashlib.sha256(id_.encode()).hexdigest(), 16) * 5 < 2**256]
    assert len(drawn) == pytest.approx(400, abs=4 * 18)
    assert assigned.subsets == {id_: hashed_subset(id_) for id_ in assigned.subsets}


@pytest.mark.parametrize("count", range(2, 6))
def test_a_draw_of_few_leaves_neither_side_empty(count: int, tmp_path: Path) -> None:
    assigned = assign_subsets(written(tmp_path, " ".join("-" * count)), "own.csv")
    assert set(assigned.subsets.values()) == {"training", "validation"}
    moved = [id_ for id_, subset in assigned.subsets.items() if subset != hashed_subset(id_)]
    assert len(moved) <= 1


@pytest.mark.parametrize(
    ("subsets", "named", "line"),
    [
        (
            "one two",
            (),
            "own.csv: no test subset among 'one' (1 videos), 'two' (1 videos): name it with --test-",
        ),
        ("test test", (), "own.csv: no training subset beside the test subset test: 'test' (2 videos)"),
        (
            "train val",
            ("dev",),
            "own.csv: --test-subset dev: the subsets with instances are 'train' (1 videos), ",
        ),
        ("- -", ("dev",), "own.csv: no video has a subset, --test-subset is dev"),
    ],
)
def test_no_test_subset(subsets: str, named: tuple[str, ...], line: str, tmp_path: Path) -> None:
    with pytest.raises(AnnotationError) as error:
        assign_subsets(written(tmp_path, subsets), "own.csv", named)
    assert str(error.value).startswith(line)
