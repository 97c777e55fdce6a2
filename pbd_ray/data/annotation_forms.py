"""Annotations as people have them: ActivityNet JSON, THUMOS14's folders of text files, CSV.

All become the same `Written`; what stands in it is readable, and not yet held against anything. Times are
seconds.

THUMOS14 has a file for every class and subset, `CLASS_val.txt` and `CLASS_test.txt`, of lines
`VIDEO START END`. A CSV file has the columns `video,label,start,end`, in any order, and maybe `subset`; a row
with neither label, start nor end is a video without instances.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from pbd_ray.config import one_line
from pbd_ray.data.annotations import AMBIGUOUS
from pbd_ray.data.json_file import AnnotationError, JsonNode, read_text
from pbd_ray.data.unannotated import FOLDER_SUFFIXES

_COLUMNS = ("video", "label", "start", "end")
_THUMOS_FILE = re.compile(r"(?P<label>.+)_(?P<subset>train|val|test)\.txt", re.IGNORECASE)


@dataclass(frozen=True)
class Problem:
    """Something that is wrong with the data."""

    kind: str
    """A few words, the same for all problems of a kind."""
    line: str
    """File, field and value."""


@dataclass(frozen=True, eq=False)
class WrittenInstance:
    """An instance whose end is not before its start."""

    node: JsonNode
    """Its segment, where it stands."""
    label: str
    start_seconds: float
    end_seconds: float


@dataclass(frozen=True, eq=False)
class WrittenVideo:
    """What is written about a video."""

    node: JsonNode
    """Where it stands first."""
    id: str
    file: str | None
    """Its name, where that is written."""
    subset: str | None
    duration_seconds: float = 0.0
    """0.0: not written."""
    frames: int = 0
    """0: not written."""
    instances: tuple[WrittenInstance, ...] = ()


@dataclass(frozen=True, eq=False)
class Written:
    """A file or folder of annotations."""

    form: str
    videos: tuple[WrittenVideo, ...]
    problems: tuple[Problem, ...]
    """What could not be read."""


def read_written(path: str | Path) -> Written:
    """Read annotations of any of the three forms: a folder, a `.csv` file, else JSON.

    Raises:
        AnnotationError: nothing can be made of the whole of it.
    """
    given, problems = Path(path), list[Problem]()
    if given.is_dir():
        form, videos = "THUMOS14 text files", _collected(_thumos_rows(given, problems), problems)
    elif given.suffix.lower() == ".csv":
        form, videos = "CSV", _collected(_csv_rows(given, problems), problems)
    else:
        form, videos = "ActivityNet JSON", _json_videos(given, problems)
    if not videos:
        first = f"; the first problem: {problems[0].line}" if problems else ""
        raise AnnotationError(f"{path}: no video can be read from it{first}")
    return Written(form, videos, tuple(problems))


def _unreadable(error: AnnotationError) -> Problem:
    return Problem("cannot be read", str(error))


def _instance(label: JsonNode, segment: JsonNode) -> WrittenInstance | None:
    """None: not an instance of a class."""
    name = label.text()
    return None if name == AMBIGUOUS else WrittenInstance(segment, name, *segment.segment())


def _json_videos(path: Path, problems: list[Problem]) -> tuple[WrittenVideo, ...]:
    videos = []
    for id_, entry in JsonNode.read(path).member("database").items():
        try:
            video = _json_video(id_, entry)
            nodes = list(entry.member("annotations").elements())
        except AnnotationError as error:
            problems.append(_unreadable(error))
            continue
        found = []
        for node in nodes:
            try:
                found.append(_instance(node.member("label"), node.member("segment")))
            except AnnotationError as error:
                problems.append(_unreadable(error))
        videos.append(replace(video, instances=tuple(instance for instance in found if instance)))
    return tuple(videos)


def _json_video(id_: str, entry: JsonNode) -> WrittenVideo:
    entry.check_inside_root(id_)

    def optional(*names: str) -> JsonNode | None:
        nodes = (entry.member(name, required=False) for name in names)
        return next((node for node in nodes if node is not None), None)

    file, subset, duration = optional("file"), optional("subset"), optional("duration")
    frames = optional("frame", "frames")
    return WrittenVideo(
        entry,
        id_,
        _id_and_file(id_)[1] if file is None else file.text(),
        None if subset is None else subset.text(),
        0.0 if duration is None else duration.positive(),
        0 if frames is None else int(frames.positive()),
    )


@dataclass(frozen=True, eq=False)
class _Row:
    """A line of a text or CSV file, about one instance of one video."""

    node: JsonNode
    video: str
    subset: str | None
    label: str
    start: str
    end: str

    def written(self) -> tuple[WrittenVideo, WrittenInstance | None]:
        """Raises AnnotationError: it cannot be read."""
        name = JsonNode(self.video, ", video", self.node)
        stem, file = _id_and_file(name.text())
        name.check_inside_root(self.video)
        video = WrittenVideo(self.node, stem, file, self.subset)
        if not self.label and not self.start and not self.end:
            return video, None
        ends = [_number(self.start), _number(self.end)]
        return video, _instance(
            JsonNode(self.label, ", label", self.node), JsonNode(ends, ", [start, end]", self.node)
        )


def _id_and_file(name: str) -> tuple[str, str | None]:
    """A video is called by its file or, without suffix, by its id."""
    suffix = PurePosixPath(name).suffix
    return (name.removesuffix(suffix), name) if suffix.lower() in FOLDER_SUFFIXES else (name, None)


def _number(text: str) -> Any:
    """The number, or the text where it is none."""
    try:
        return float(text)
    except ValueError:
        return text


def _collected(rows: Iterator[_Row], problems: list[Problem]) -> tuple[WrittenVideo, ...]:
    videos: dict[str, WrittenVideo] = {}
    instances: dict[str, list[WrittenInstance]] = {}
    for row in rows:
        try:
            video, instance = row.written()
            _require_same(row.node, video, videos.get(video.id, video))
        except AnnotationError as error:
            problems.append(_unreadable(error))
            continue
        videos.setdefault(video.id, video)
        instances.setdefault(video.id, []).extend([instance] if instance else [])
    return tuple(replace(video, instances=tuple(instances[video.id])) for video in videos.values())


def _require_same(node: JsonNode, video: WrittenVideo, first: WrittenVideo) -> None:
    for name in ("file", "subset"):
        ours, theirs = getattr(video, name), getattr(first, name)
        if ours != theirs:
            raise JsonNode(ours, f", {name}", node).error(
                f"expected {theirs!r} as video {video.id!r} has at {first.node.where}"
            )


def _csv_rows(path: Path, problems: list[Problem]) -> Iterator[_Row]:
    root = JsonNode(None, str(path))
    lines = csv.reader(io.StringIO(read_text(path), newline=""), strict=True, skipinitialspace=True)
    try:
        header = [name.strip().lower() for name in next(lines, [])]
        missing = [name for name in _COLUMNS if name not in header]
        if missing:
            raise JsonNode(header, "line 1", root).error(f"no column {', '.join(map(repr, missing))}")
        for cells in lines:
            node = JsonNode(cells, f"line {lines.line_num}", root)
            row = dict(zip(header, (cell.strip() for cell in cells), strict=False))
            if len(cells) == len(header):
                yield _Row(
                    node, row["video"], row.get("subset") or None, *(row[name] for name in _COLUMNS[1:])
                )
            elif any(row.values()):
                problems.append(_unreadable(node.error(f"expected {len(header)} cells")))
    except csv.Error as error:
        raise AnnotationError(f"{path}: line {lines.line_num}: not CSV: {one_line(error)}") from None


def _thumos_rows(folder: Path, problems: list[Problem]) -> Iterator[_Row]:
    files = sorted(path for path in folder.rglob("*.txt") if _THUMOS_FILE.fullmatch(path.name))
    if not files:
        raise AnnotationError(f"{folder}: no file CLASS_val.txt, CLASS_test.txt or CLASS_train.txt")
    for path in files:
        named = _THUMOS_FILE.fullmatch(path.name)
        assert named is not None
        root = JsonNode(None, str(path))
        for number, line in enumerate(read_text(path).splitlines(), 1):
            words = line.split()
            node = JsonNode(line, f"line {number}", root)
            if len(words) == 3:
                yield _Row(node, words[0], named["subset"].lower(), named["label"], *words[1:])
            elif words:
                problems.append(_unreadable(node.error("expected 'VIDEO START END'")))
