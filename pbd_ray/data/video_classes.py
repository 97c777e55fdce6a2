"""Names for class-agnostic detections, from a classifier of whole videos (ActivityNet; design, section 2).

A class-agnostic detector finds actions without naming them. For mAP every detection then stands once for
each of its video's most probable classes, at its score times that probability.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pbd_ray.data.annotations import DETECTION_SCHEMA, Annotations
from pbd_ray.data.json_file import AnnotationError, JsonNode, shown


@dataclass(frozen=True, eq=False)
class VideoClasses:
    """What videos that are detected class-agnostic are published as, and what a classifier makes of them."""

    published: Annotations
    """The same videos with the labels and classes of their annotation file."""
    probabilities: Mapping[str, npt.NDArray[np.float64]]
    """Video -> (C,), in the order of `published.classes`; every published video has some."""
    top: int
    """Classes that a detection stands for, at least 1; more than C means C."""

    def name(self, detections: pa.Table) -> pa.Table:
        """DETECTION_SCHEMA rows, class-agnostic, as named ones; of equal probabilities the lower class."""
        if detections.num_rows == 0:
            return DETECTION_SCHEMA.empty_table()
        encoded = detections.column("video").combine_chunks().dictionary_encode()
        video = encoded.indices.to_numpy(zero_copy_only=False)
        table = np.stack([self.probabilities[name] for name in encoded.dictionary.to_pylist()])
        best = np.argsort(-table, axis=1, kind="stable")[:, : self.top]
        rows = np.repeat(np.arange(len(video)), best.shape[1])
        labels = best[video].reshape(-1)
        columns = {name: detections.column(name).to_numpy()[rows] for name in ("start", "end")}
        columns["label"] = labels.astype(np.int32)
        columns["score"] = detections.column("score").to_numpy()[rows] * table[video[rows], labels]
        names = detections.column("video").take(pa.array(rows))
        return pa.table({"video": names, **columns}, schema=DETECTION_SCHEMA)


def scored_against(annotations: Annotations) -> Annotations:
    """The videos with the labels that mAP compares with: the published ones, where detections get names."""
    naming = annotations.video_classes
    return (
        annotations if naming is None else naming.published.select(video.id for video in annotations.videos)
    )


def named(annotations: Annotations, detections: pa.Table) -> pa.Table:
    """DETECTION_SCHEMA rows on these videos, named where a video classifier names them."""
    naming = annotations.video_classes
    return detections if naming is None else naming.name(detections)


def read_probabilities(
    path: str | Path, classes: tuple[str, ...], videos: Collection[str]
) -> dict[str, npt.NDArray[np.float64]]:
    """Probabilities of those `videos` that the file has: `{"class": [name], "results": {video: [p]}}`.

    This is the form of CUHK's ActivityNet files. A video may also stand there as `v_` + id.

    Args:
        classes: every one has to be in the file; what else is there is left out.

    Returns:
        Video -> (C,), in the order of `classes`.

    Raises:
        AnnotationError: naming file, field and value.
    """
    content = JsonNode.read(path)
    names_node = content.member("class")
    names = [node.text() for node in names_node.elements()]
    if len(set(names)) != len(names):
        raise names_node.error("expected distinct class names")
    missing = [name for name in classes if name not in set(names)]
    if missing:
        raise AnnotationError(
            f"{path}: class: has no {shown(missing[0])} ({len(missing)} of {len(classes)} classes missing)"
        )
    order = [names.index(name) for name in classes]
    results = content.member("results")
    found = {}
    for id_ in videos:
        node = results.member(id_, required=False) or results.member(f"v_{id_}", required=False)
        if node is None:
            continue
        values = [entry.number() for entry in node.elements()]
        if len(values) != len(names):
            raise node.error(f"expected {len(names)} probabilities")
        found[id_] = np.array(values)[order]
    return found
