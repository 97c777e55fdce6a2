"""10,000 spoiled annotation and prediction files: each gives a number or one clear line, soon."""

from __future__ import annotations

import json
import logging
import random
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pbd_ray.config import UserError
from pbd_ray.data.annotations import load_annotations, read_detections
from pbd_ray.metrics.mean_ap import mean_average_precision

CPU_SECONDS = 5.0
"""A case that computes longer hangs."""


class Raw(str):
    """Text that goes into a file as it is, valid JSON or not."""


class Pairs(list[tuple[Any, Any]]):
    """An object whose keys may repeat or be no text."""


def activitynet() -> Any:
    instances = [("jump", 1, 2.5), ("sit", 2, 9.5), ("jump", 1.0002, 2.5), ("run", 4, 4)]
    annotations = [{"label": label, "segment": [start, end]} for label, start, end in instances]
    entry = {"subset": "validation", "duration": 10.0, "url": "http://x", "annotations": annotations}
    other = {"subset": "training", "duration": 55.5, "resolution": "320x240", "annotations": annotations[1:]}
    database = {"a": entry, "b/c": other, "d": {**entry, "fps": 29.97, "file": "x/d.mkv"}}
    return {"version": "1.3", "database": database, "taxonomy": [{"nodeId": 1, "parentId": None}]}


def thumos() -> Any:
    annotations = [
        {"label": "Ambiguous", "segment": [0.5, 3.25], "segment(frames)": [15, 97]},
        {"label": "Diving", "segment": [2.0, 3.5], "segment(frames)": [60, 105]},
        {"label": "Shotput", "segment": [30.0, 41.0], "segment(frames)": [900, 1230]},
    ]
    names = ("video_test_0000004", "video_validation_0000051")
    return {
        "database": {
            name: {"subset": "validation", "duration": 33.67, "frame": 1010, "annotations": annotations}
            for name in names
        }
    }


def predictions(truth: Any) -> Any:
    results = {
        name: [
            {
                "label": one["label"],
                "segment": [one["segment"][0], one["segment"][1] + 0.1 * k],
                "score": 0.9**k,
            }
            for k, one in enumerate(entry["annotations"] * 2)
        ]
        for name, entry in truth["database"].items()
    }
    return {"version": "VERSION 1.3", "results": results, "external_data": {}}


NUMBERS = [
    "NaN", "Infinity", "-Infinity", "1e999", "-1e999", "9" * 400, "9" * 5000, "1e-999", "-0.0", "-1", "0",
    "1", "0.5", "3.999999999999999999", "1e9", "1000000001", "-1e9", "9223372036854775808", "4e18", "1e300",
    "01", "0x10", "1_000", "\u0661",
]  # fmt: skip
TEXTS = [
    "", " ", "jump", "sit", "Ambiguous", "a", "validation", "12", "1e5", "\ud800", "\udc80x", "\0", "a\nb",
    "a\u2028b", "\x85", "../x", "/etc/passwd", "a/", "\\", "\u202e", "\U0001f938", "x" * 10_000, "database",
    "results", "{}", "%s{0}",
]  # fmt: skip
OTHERS = [
    "null",
    "true",
    "false",
    "[]",
    "{}",
    "[[]]",
    "[null]",
    "[1, 2, 3]",
    "[2, 1]",
    '{"a": 1}',
    "",
    ",",
    "nul",
]
DEPTHS = (10, 500, 990, 5_000, 200_000)


def anything(rng: random.Random) -> Any:
    kind = rng.randrange(8)
    if kind < 3:
        return Raw(rng.choice(NUMBERS))
    if kind < 5:
        return rng.choice(TEXTS)
    if kind < 7:
        return Raw(rng.choice(OTHERS))
    depth = rng.choice(DEPTHS)
    opening, closing = rng.choice([("[", "]"), ('{"a":', "}")])
    return Raw(opening * depth + "1" + closing * rng.choice([depth, depth, depth - 1]))


def anything_like(value: Any, rng: random.Random) -> Any:
    """Half of the time what may stand in this place: a file that is read, and odd."""
    if rng.random() < 0.5:
        return anything(rng)
    if isinstance(value, int | float):
        return Raw(
            rng.choice(["0", "1", "0.5", "-0.0", "1e9", "1e-999", "-1", "3.999999999999999999", "2e0"])
        )
    if isinstance(value, str):
        return rng.choice(["jump", "sit", "Ambiguous", "validation", "training", "12", "%s{0}", "\U0001f938"])
    return Raw("[]" if isinstance(value, list) and not isinstance(value, Pairs) else "{}")


def written(node: Any) -> str:
    if isinstance(node, Raw):
        return str(node)
    if isinstance(node, Pairs):
        return "{" + ", ".join(f"{written(key)}: {written(value)}" for key, value in node) + "}"
    if isinstance(node, dict):
        return written(Pairs(node.items()))
    if isinstance(node, list):
        return "[" + ", ".join(map(written, node)) + "]"
    return json.dumps(node)


def slots(node: Any) -> list[tuple[Any, int]]:
    """(container, place) of every value below `node`; objects become `Pairs` on the way."""
    found: list[tuple[Any, int]] = []
    for place in range(len(node)):
        child = node[place][1] if isinstance(node, Pairs) else node[place]
        if isinstance(child, dict):
            child = Pairs(child.items())
            node[place] = (node[place][0], child) if isinstance(node, Pairs) else child
        found.append((node, place))
        if isinstance(child, list):
            found.extend(slots(child))
    return found


def spoil_tree(rng: random.Random, tree: Any) -> bytes:
    """Change one to three values, keys or elements."""
    root = [tree]
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        places = slots(root)
        if rng.random() < 0.3:  # what holds others: videos, lists of instances
            places = [
                (c, p) for c, p in places if isinstance(c, Pairs) and isinstance(c[p][1], list)
            ] or places
        container, place = rng.choice(places)
        keyed = isinstance(container, Pairs)
        key, value = container[place] if keyed else (None, container[place])
        action = rng.randrange(9)
        if action == 0 and container is not root:
            del container[place]
        elif action == 1 and keyed:
            new = rng.choice(TEXTS) if rng.random() < 0.8 else Raw(rng.choice(NUMBERS))
            container[place] = (new, value)
        elif action == 2 and container is not root:
            container.insert(rng.randint(0, len(container)), container[place])
        elif action == 3 and container is not root:
            container.extend(container[place:] * rng.choice([1, 1, 40]))
        else:
            value = [value] if action == 4 else anything_like(value, rng)
            container[place] = (key, value) if keyed else value
    return written(root[0]).encode("utf-8", "surrogatepass")


def spoil_bytes(rng: random.Random, content: bytes) -> bytes:
    """Cut, repeat, overwrite and insert, without regard to what the bytes mean."""
    for _ in range(rng.choice([1, 1, 1, 2, 8])):
        begin = rng.randrange(len(content) + 1)
        end = min(len(content), begin + rng.choice([0, 1, 1, 1, 1, 2, 10, 10_000]))
        middle = content[begin:end]
        middle = rng.choice(
            [
                b"",
                middle * 2,
                rng.randbytes(len(middle)),
                bytes(byte ^ 1 << rng.randrange(8) for byte in middle[:50]),
                rng.choice(
                    [b"\xef\xbb\xbf", b"\x00", b"\xff", b"\\ud800", b"9" * 30, b"e", b"-", b"]", b'"', b"\r"]
                ),
                rng.choice([*NUMBERS, *OTHERS]).encode(),
            ]
        )
        content = content[:begin] + middle + content[end:]
    return content


def spoiled(rng: random.Random, make: Callable[[], Any]) -> bytes:
    return spoil_tree(rng, make()) if rng.random() < 0.7 else spoil_bytes(rng, written(make()).encode())


def score(rng: random.Random, truth: Path, found: Path) -> float:
    """mAP as a user gets it, by any of the ways to read the files."""
    options = rng.choice(
        [{}, {"class_agnostic": True}, {"classes": ("jump", "sit", "run", "Diving", "Shotput")}]
    )
    annotations = load_annotations(truth, **options)
    if rng.random() < 0.5:
        annotations = annotations.subset("validation")
    names = [video.id for video in annotations.videos] if rng.random() < 0.5 else None
    detections = read_detections(found, annotations.classes, names).table
    ground_truth, count = annotations.ground_truth(), len(annotations.classes)
    return mean_average_precision(ground_truth, detections, (0.3, 0.5), count, names).average_map


def outcome(case: int, folder: Path) -> str:
    """What became of one case: 'number', or the error's text less what it quotes.

    Raises:
        AssertionError: a number that is none, or an error that is not one clear line.
    """
    rng = random.Random(case)
    make = rng.choice([activitynet, thumos])
    which = rng.choice(["truth", "found", "found", "truth", "both"])
    truth = written(make()).encode() if which == "found" else spoiled(rng, make)
    found = (
        spoiled(rng, lambda: predictions(make()))
        if which != "truth"
        else written(predictions(make())).encode()
    )
    paths = folder / "truth.json", folder / "found.json"
    for path, content in zip(paths, (truth, found), strict=True):
        path.write_bytes(content)
    try:
        value = score(rng, *paths)
    except UserError as error:
        message = str(error)
        assert message.isprintable() and len(message) < 400 + len(str(folder)), message[:1000]
        return message.rpartition(", got ")[0].rpartition(": ")[2] or message.partition(".json: ")[2][:12]
    assert 0 <= value <= 1
    return "number"


def too_long(*_: object) -> None:
    raise TimeoutError(f"more than {CPU_SECONDS} CPU seconds")


@pytest.mark.parametrize(
    "cases", [range(1000), pytest.param(range(1000, 10_000), marks=pytest.mark.slow)], ids=["some", "all"]
)
def test_spoiled_files(cases: range, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)  # the warnings of thousands of files are not what is looked at
    outcomes: Counter[str] = Counter()
    before = signal.signal(signal.SIGVTALRM, too_long)
    try:
        for case in cases:
            signal.setitimer(signal.ITIMER_VIRTUAL, CPU_SECONDS)
            try:
                outcomes[outcome(case, tmp_path)] += 1
            except BaseException as error:
                error.add_note(f"case {case}; its files are in {tmp_path}")
                raise
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
    # Spoiled in many ways, and not so that nothing is left to read.
    assert 0.1 * len(cases) < outcomes["number"] < 0.8 * len(cases), outcomes
    assert len(outcomes) > 15, outcomes
