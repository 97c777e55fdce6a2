"""Actions in any video: what `jobs/detect.py` runs."""

from __future__ import annotations

import csv
import io
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from pbd_ray.cluster.backend import backend, backend_steps
from pbd_ray.cluster.detecting import detected_rows
from pbd_ray.cluster.monitoring import say, throttled
from pbd_ray.cluster.output import check_output
from pbd_ray.cluster.preflight import usable_videos
from pbd_ray.compression.blocks import from_detector
from pbd_ray.config import (
    ConfigError,
    DataConfig,
    Execution,
    Experiment,
    Recipe,
    changed,
    parse_override,
)
from pbd_ray.data.annotations import AGNOSTIC_CLASSES, Annotations, Split, Video, detections_to_json
from pbd_ray.data.unannotated import Unannotated, find_videos
from pbd_ray.data.video import VideoError, probe_video, read_frames
from pbd_ray.data.windows import Window
from pbd_ray.detector.bundle import Bundle, load_bundle
from pbd_ray.report.output import write_files
from pbd_ray.report.timeline import draw_timeline, strip_info, timeline_info
from pbd_ray.search.evaluation import detections_of

_NOT_HERE = ("run_dir", "data_root", "annotations", "pretrained_weights", "external_classifier")
"""Keys of execution that have no meaning for unannotated videos."""


@dataclass(frozen=True, eq=False)
class Detections:
    """What one detector found in the videos."""

    name: str
    """For people: where its bundle is, and how deep it is."""
    table: pa.Table
    """DETECTION_SCHEMA, videos in the user's order, each by falling score."""

    def of(self, video: str) -> pa.Table:
        """Those of one video."""
        return self.table.filter(pc.equal(self.table["video"], video))


def run_detection(
    directories: Sequence[str],
    paths: Sequence[str],
    overrides: Sequence[str],
    min_score: float | None,
    output: Path,
) -> int:
    """Detect actions with one bundle, or with two side by side; write JSON, CSV and a timeline a video.

    Args:
        directories: of the bundles.
        paths: video files, and folders of them.
        overrides: as of `detection_recipe`.
        min_score: of what is drawn (`timeline_info`).

    Returns:
        0, or 1 where a video could not be decoded: it is named, and the others are done.

    Raises:
        UserError: what the user can mend, and where no video can be decoded; nothing is written then.
    """
    check_output(output)
    if min_score is not None and not 0 <= min_score <= 1:
        raise ConfigError(f"--min-score {min_score:g} is not between 0 and 1")
    found = find_videos(paths)
    bundles = [load_bundle(directory) for directory in directories]
    for directory, bundle in zip(directories[1:], bundles[1:], strict=True):
        if bundle.classes != bundles[0].classes:
            theirs, ours = list(bundle.classes), list(bundles[0].classes)
            raise ConfigError(f"--beside {directory}: classes {theirs}, --bundle has {ours}")
    recipes = [detection_recipe(bundle, found, overrides) for bundle in bundles]
    failed: dict[str, str] = {}

    def lost(video: str, error: Exception) -> None:
        failed[video] = str(error)

    with backend(recipes[0], workers=1), tempfile.TemporaryDirectory() as scratch:
        split, source, left_out = usable_videos(recipes[0], _split(found, bundles[0]))
        failed.update(left_out.reasons)
        outcomes = []
        for directory, bundle, recipe in zip(directories, bundles, recipes, strict=True):
            name = f"{directory} ({len(bundle.kept_blocks)} blocks)"
            say(f"detecting with {name}")
            with backend_steps(recipe, split, source, scratch, _told(recipe)) as steps:
                rows = detected_rows(recipe, split, steps, from_detector(bundle.detector), lost)
            outcomes.append(Detections(name, _in_order(detections_of(rows), split.test.videos)))
    videos = [video for video in split.test.videos if video.id not in failed]
    if not videos:
        raise VideoError(f"none of {len(found.videos)} videos can be decoded; {next(iter(failed.values()))}")
    whole = pa.array([video.id for video in videos])  # a video may have failed the second detector only
    outcomes = [replace(one, table=one.table.filter(pc.is_in(one.table["video"], whole))) for one in outcomes]
    write_files(output, _tables(outcomes, videos, bundles[0].classes))
    progress = throttled(recipes[0].execution.progress_seconds)
    for number, video in enumerate(videos, 1):
        try:
            picture = _picture(video, outcomes, bundles[0].classes, min_score)
        except VideoError as error:
            lost(video.id, error)
        else:
            write_files(output, {f"{video.id}.png": picture})
            progress(f"picture {number} of {len(videos)}, {video.id}")
    for id_, reason in failed.items():
        say(f"failed: {id_}: {reason}")
    counts = " and ".join(str(outcome.table.num_rows) for outcome in outcomes)
    say(f"{output}: {counts} detections in {len(videos)} of {len(found.videos)} videos")
    return 1 if failed else 0


def detection_recipe(bundle: Bundle, found: Unannotated, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe of nothing but a bundle's detector on the videos found. One video is for this process.

    Args:
        overrides: of `execution`; and `autocast`, which a bundle does not tell.

    Raises:
        ConfigError: an override that is none, or of anything else.
    """
    values = {}
    for override in overrides:
        key, value = parse_override(override)
        name = key.removeprefix("execution.")
        counts = name in Execution.model_fields and name not in _NOT_HERE
        if not counts and key.removeprefix("experiment.") != "autocast":
            raise ConfigError(f"'{override}': no such video, and no value of execution that counts here")
        values[key] = value
    data = DataConfig(
        classes=bundle.classes, class_agnostic=bundle.classes == AGNOSTIC_CLASSES, max_quarantined=1.0
    )
    execution = Execution(
        data_root=found.root, backend="local" if len(found.videos) == 1 else "ray", cache_gigabytes=0
    )
    experiment = Experiment(name="detect", data=data, detector=bundle.config)
    return changed(Recipe(experiment=experiment, execution=execution), values)


def _split(found: Unannotated, bundle: Bundle) -> Split:
    nothing = Annotations(bundle.classes, ())
    return Split(fit=nothing, selection=nothing, test=Annotations(bundle.classes, found.videos))


def _told(recipe: Recipe) -> Callable[[Window], None]:
    """Says how far into its video a window is."""
    progress = throttled(recipe.execution.progress_seconds)

    def tell(window: Window) -> None:
        seconds = window.frame_indices[-1] / window.fps
        progress(f"{window.video}: {seconds:.0f} of {window.duration_seconds:.0f} s")

    return tell


def _in_order(table: pa.Table, videos: Sequence[Video]) -> pa.Table:
    place = {video.id: number for number, video in enumerate(videos)}
    places = pa.array([place[name] for name in table["video"].to_pylist()], pa.int64())
    keys = [("place", "ascending"), ("score", "descending"), ("start", "ascending")]
    return table.append_column("place", places).sort_by(keys).drop_columns(["place"])


def _tables(
    outcomes: Sequence[Detections], videos: Sequence[Video], classes: Sequence[str]
) -> Mapping[str, bytes]:
    """detections.json and .csv; of the second detector detections_beside.json and .csv."""
    files = {}
    paths = {video.id: video.path for video in videos}
    for stem, outcome in zip(("detections", "detections_beside"), outcomes, strict=False):
        text = json.dumps(detections_to_json(outcome.table, classes), indent=1, allow_nan=False)
        files[f"{stem}.json"] = f"{text}\n".encode()
        stream = io.StringIO(newline="")
        writer = csv.writer(stream)
        writer.writerow(("video", "label", "start_seconds", "end_seconds", "score", "file"))
        columns = (outcome.table[name].to_pylist() for name in ("video", "label", "start", "end", "score"))
        for id_, label, start, end, score in zip(*columns, strict=True):
            writer.writerow((id_, classes[label], start, end, score, paths[id_]))
        files[f"{stem}.csv"] = stream.getvalue().encode("utf-8", "surrogateescape")
    return files


def _picture(
    video: Video, outcomes: Sequence[Detections], classes: Sequence[str], min_score: float | None
) -> bytes:
    info = timeline_info(
        [outcome.of(video.id) for outcome in outcomes], classes, video.duration_seconds, min_score
    )
    probe = probe_video(video.path)
    strip = strip_info(video.frames, video.fps, probe.width, probe.height)
    frames = read_frames(video.path, strip.indices, strip.short_side_pixels)
    return draw_timeline(info, strip, frames, video.id, [outcome.name for outcome in outcomes])
