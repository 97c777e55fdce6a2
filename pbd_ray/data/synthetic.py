"""The embedded data set: untrimmed videos whose actions are told apart by motion over time alone.

A textured sprite, the actor, moves over a textured background. Four motions are actions: `rise` and
`fall` sweep its y, `grow` and `shrink` its size; all wrap around. Between them come motions nobody
annotates (still, drift, jitter, sway). Every motion keeps x, y and size uniform and independent of
each other, and continues from where the last one ended, so a single frame tells neither the class nor
whether an action goes on; no motion cares about a horizontal flip.

`scene` draws a video's latent state from the seed, `render` turns one frame of it into pixels, and
`generate` writes H.264 files and ActivityNet annotations.
"""

from __future__ import annotations

import colorsys
import hashlib
import json
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from fractions import Fraction
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from pbd_ray.config import SyntheticConfig, UserError
from pbd_ray.data.annotations import Annotations, Video, annotations_to_json

CLASSES = ("fall", "grow", "rise", "shrink")
"""Class names in label order (sorted, as `load_annotations` orders them by default)."""
DISTRACTORS = ("still", "drift", "jitter", "sway")
SUBSETS = ("fit", "selection", "test")
ANNOTATIONS_FILE = "annotations.json"
MANIFEST_FILE = "manifest.json"

_GENERATOR_VERSION = 3  # goes into the hash: raise it whenever the same config would give other pixels
_ACTION_SECONDS = (1.2, 4.5)
_BACKGROUND_SECONDS = (1.0, 5.0)
_PERIOD_SECONDS = (0.8, 1.8)
_HOLD_SECONDS = (0.1, 0.3)
_RADIUS = (0.14, 0.30)  # of the frame's side
_SHORTEST_SECONDS = 5.0  # a video this long always has room for one action with background around it
_LOWEST_FPS = 8  # the fastest sweep then moves 0.16 of its range a frame: no aliasing
_LUMA = np.array([0.299, 0.587, 0.114])
_YUV_1024 = np.array([[263, 516, 100], [-152, -298, 450], [450, -377, -73]])  # BT.601, video range
_SHAPES = ("disc", "square", "diamond")

Floats = NDArray[np.float32]


class SyntheticError(UserError):
    """The configuration cannot be drawn, or the directory holds something else. One line."""


@dataclass(frozen=True)
class Motion:
    """What a sprite does in frames [start, end): one of CLASSES or DISTRACTORS."""

    kind: str
    start: int
    end: int


@dataclass(frozen=True, eq=False)
class Sprite:
    """A soft-edged textured shape. x, y, size: (frames,) float64.

    x and y in [0, 1) of the frame's side, where the right edge meets the left and the bottom the top;
    size is the radius as a fraction of the side (that of the disc of equal area for other shapes).
    """

    x: NDArray[np.float64]
    y: NDArray[np.float64]
    size: NDArray[np.float64]
    shape: str
    colour: Floats
    texture: tuple[float, float, float]  # waves across x and y, phase


@dataclass(frozen=True, eq=False)
class Scene:
    """Everything one video shows. segments: (n, 2) int64 frames [start, end); labels: (n,) int32."""

    id: str
    subset: str
    fps: int
    frames: int
    side_pixels: int
    actor: Sprite
    passive: Sprite | None
    timeline: tuple[Motion, ...]
    segments: NDArray[np.int64]
    labels: NDArray[np.int32]
    backdrop: Floats  # (2 side, 2 side, 3): a periodic texture, tiled so that panning is a slice
    pan_pixels: tuple[float, float]  # a frame, along x and y
    brightness: Floats  # (frames,)

    @property
    def actor_x(self) -> NDArray[np.float64]:
        return self.actor.x

    @property
    def actor_y(self) -> NDArray[np.float64]:
        return self.actor.y

    @property
    def actor_size(self) -> NDArray[np.float64]:
        return self.actor.size


def scene(config: SyntheticConfig, subset: str, index: int) -> Scene:
    """Draw video `index` of `subset` (one of SUBSETS); depends on the seed and these two alone.

    Raises:
        SyntheticError: the configuration cannot be drawn (odd size, too short, too few fps, ...).
    """
    _check(config)
    rng = np.random.default_rng(np.random.SeedSequence((config.seed, SUBSETS.index(subset), index)))
    fps, side = config.fps, config.short_side_pixels
    frames = round(rng.uniform(config.min_duration_seconds, config.max_duration_seconds) * fps)
    timeline = _actor_timeline(rng, frames, fps)
    actions = [motion for motion in timeline if motion.kind in CLASSES]

    hue = rng.random()
    actor = _sprite(rng, timeline, fps, hue)
    passive = None
    if rng.random() < 0.3:
        other_hue = (hue + rng.uniform(0.3, 0.7)) % 1.0
        passive = _sprite(rng, _passive_timeline(rng, frames, fps), fps, other_hue)
    panning = float(rng.random() < 0.5)
    speed, angle = panning * rng.uniform(0.02, 0.08) * side / fps, rng.uniform(0, 2 * np.pi)
    waves = 2 * np.pi * np.arange(frames) / (rng.uniform(4, 12) * fps) + rng.uniform(0, 2 * np.pi)
    return Scene(
        id=f"{subset}_{index:04d}",
        subset=subset,
        fps=fps,
        frames=frames,
        side_pixels=side,
        actor=actor,
        passive=passive,
        timeline=timeline,
        segments=np.array([(m.start, m.end) for m in actions], np.int64).reshape(-1, 2),
        labels=np.array([CLASSES.index(m.kind) for m in actions], np.int32),
        backdrop=_backdrop(rng, side),
        pan_pixels=(float(speed * np.cos(angle)), float(speed * np.sin(angle))),
        brightness=(1 + rng.uniform(0, 0.08) * np.sin(waves)).astype(np.float32),
    )


def render(scene: Scene, frame: int) -> NDArray[np.uint8]:
    """Pixels of one frame: (side, side, 3) uint8 RGB."""
    side = scene.side_pixels
    column, right = _split_pixel(scene.pan_pixels[0] * frame, side)
    row, down = _split_pixel(scene.pan_pixels[1] * frame, side)
    image: NDArray[Any] = scene.backdrop[row : row + side, column : column + side]
    if scene.pan_pixels != (0.0, 0.0):
        below = scene.backdrop[row + 1 : row + 1 + side, column : column + side + 1]
        above = scene.backdrop[row : row + side, column : column + side + 1]
        rows = above + (below - above) * down
        image = rows[:, :-1] + (rows[:, 1:] - rows[:, :-1]) * right
    image = image * scene.brightness[frame]  # also a copy: the sprites are painted into it
    if scene.passive is not None:
        _paint(image, scene.passive, frame)
    _paint(image, scene.actor, frame)  # on top: an action is never hidden
    np.clip(image, 0, 255, out=image)
    image += 0.5
    pixels: NDArray[np.uint8] = image.astype(np.uint8)
    return pixels


def annotate(config: SyntheticConfig) -> Annotations:
    """What `generate` annotates, from the scenes alone (no pixel is drawn)."""
    videos = []
    for subset, index in _plan(config):
        drawn = scene(config, subset, index)
        videos.append(
            Video(
                id=drawn.id,
                path=_file_name(subset, index),
                subset=subset,
                duration_seconds=drawn.frames / drawn.fps,
                fps=float(drawn.fps),
                frames=drawn.frames,
                segments_seconds=drawn.segments / drawn.fps,
                labels=drawn.labels,
            )
        )
    return Annotations(classes=CLASSES, videos=tuple(videos))


def config_hash(config: SyntheticConfig) -> str:
    """SHA-256 over the configuration and the generator's version."""
    facts = {"generator": _GENERATOR_VERSION, **config.model_dump(mode="json")}
    return hashlib.sha256(json.dumps(facts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def generate(
    directory: Path,
    config: SyntheticConfig,
    progress: Callable[[int, int], None] | None = None,
    processes: int = 1,
) -> Path:
    """Write the data set into `directory` (the data root) and return the path of its annotations.

    Does only what is missing: every file appears under its name when complete, and the manifest, last.
    `progress(done, total)` is called once at the start and after every video. With `processes` > 1 the
    videos are spread over spawned processes, so a script needs its `if __name__ == "__main__"` guard.

    Raises:
        SyntheticError: the directory holds another set, or the configuration cannot be drawn.
    """
    _check(config)
    digest = config_hash(config)
    directory.mkdir(parents=True, exist_ok=True)
    annotations_path, manifest_path = directory / ANNOTATIONS_FILE, directory / MANIFEST_FILE
    version = f"pbd_ray synthetic {digest}"
    found = _read_json(annotations_path)
    if annotations_path.exists() and found.get("version") != version:
        raise SyntheticError(
            f"{directory}: holds another data set than config {digest[:8]} ({ANNOTATIONS_FILE})"
        )
    manifest = _read_json(manifest_path)
    if manifest_path.exists() and manifest.get("config_hash") != digest:
        raise SyntheticError(
            f"{directory}: holds another data set than config {digest[:8]} ({MANIFEST_FILE})"
        )

    plan = _plan(config)
    sizes = manifest.get("bytes", {})
    missing = [item for item in plan if not _is_whole(directory / _file_name(*item), sizes)]
    if manifest and not missing and annotations_path.exists():
        return annotations_path
    manifest_path.unlink(missing_ok=True)
    if not annotations_path.exists():
        # First, so that a half-written directory already says whose it is.
        _write_json(annotations_path, annotations_to_json(annotate(config), version))
    _write_videos(directory, config, missing, len(plan), progress, processes)
    sizes = {name: (directory / name).stat().st_size for name in (_file_name(*item) for item in plan)}
    facts = {"config_hash": digest, "config": config.model_dump(mode="json"), "bytes": sizes}
    _write_json(manifest_path, facts)
    return annotations_path


def ensure(
    config: SyntheticConfig,
    cache_dir: Path,
    progress: Callable[[int, int], None] | None = None,
    processes: int = 1,
) -> Path:
    """The data root of this configuration under `cache_dir`, generated where absent or incomplete."""
    directory = cache_dir / f"synthetic-{config_hash(config)[:8]}"
    generate(directory, config, progress, processes)
    return directory


def _check(config: SyntheticConfig) -> None:
    def refuse(field: str, why: str) -> SyntheticError:
        return SyntheticError(f"data.synthetic.{field} {getattr(config, field)}: {why}")

    if config.seed < 0:
        raise refuse("seed", "must not be negative")
    if config.short_side_pixels % 2 or config.short_side_pixels < 16:
        raise refuse("short_side_pixels", "must be even (yuv420p) and at least 16")
    if config.fps < _LOWEST_FPS:
        raise refuse("fps", f"must be at least {_LOWEST_FPS}")
    if config.min_duration_seconds < _SHORTEST_SECONDS:
        raise refuse("min_duration_seconds", f"must be at least {_SHORTEST_SECONDS}")
    if config.max_duration_seconds < config.min_duration_seconds:
        raise refuse("max_duration_seconds", f"is below min_duration_seconds {config.min_duration_seconds}")


def _plan(config: SyntheticConfig) -> list[tuple[str, int]]:
    counts = (config.fit_videos, config.selection_videos, config.test_videos)
    return [(subset, index) for subset, n in zip(SUBSETS, counts, strict=True) for index in range(n)]


def _file_name(subset: str, index: int) -> str:
    return f"{subset}_{index:04d}.mp4"


def _background_frames(rng: np.random.Generator, fps: int) -> int:
    low, high = np.log(_BACKGROUND_SECONDS)
    return round(float(np.exp(rng.uniform(low, high))) * fps)


def _actor_timeline(rng: np.random.Generator, frames: int, fps: int) -> tuple[Motion, ...]:
    """Background and actions in turn, background first and last; the classes come in shuffled fours."""
    timeline: list[Motion] = []
    classes: list[str] = []
    end = 0

    def add(kind: str, length: int) -> None:
        nonlocal end
        timeline.append(Motion(kind, end, end + length))
        end += length

    while True:
        background = _background_frames(rng, fps)
        action = round(rng.uniform(*_ACTION_SECONDS) * fps)
        if not timeline:  # so that the shortest video has its action
            background, action = min(background, frames // 4), min(action, frames // 2)
        distractor = str(rng.choice(DISTRACTORS))
        if end + background + action + round(_BACKGROUND_SECONDS[0] * fps) > frames:
            break
        if not classes:
            classes = [str(name) for name in rng.permutation(CLASSES)]
        add(distractor, background)
        add(classes.pop(), action)
    timeline.extend(_passive_timeline(rng, frames, fps, end))
    return tuple(timeline)


def _passive_timeline(rng: np.random.Generator, frames: int, fps: int, start: int = 0) -> tuple[Motion, ...]:
    """Distractor motions alone, from `start` to the end of the video."""
    timeline: list[Motion] = []
    while start < frames:
        end = start + _background_frames(rng, fps)
        if end + round(_BACKGROUND_SECONDS[0] * fps) > frames:  # no crumbs at the end
            end = frames
        timeline.append(Motion(str(rng.choice(DISTRACTORS)), start, end))
        start = end
    return tuple(timeline)


def _move(
    rng: np.random.Generator, motion: Motion, fps: int, state: NDArray[np.float64]
) -> NDArray[np.float64]:
    """States (n, 3) = (x, y, size), each in [0, 1), after `state`.

    Adding an amount that does not depend on the state, modulo 1, keeps a uniform state uniform: that is
    why every motion is a sweep with wrap-around, an oscillation about the current place, or a new draw.
    """
    steps = np.arange(1, motion.end - motion.start + 1)
    states = np.tile(state, (len(steps), 1))
    sweep = steps / (rng.uniform(*_PERIOD_SECONDS) * fps)
    match motion.kind:
        case "rise":
            states[:, 1] -= sweep
        case "fall":
            states[:, 1] += sweep
        case "grow":
            states[:, 2] += sweep
        case "shrink":
            states[:, 2] -= sweep
        case "drift":
            states[:, 0] += sweep * rng.choice((-1, 1))
        case "sway":
            states[:, 0] += rng.uniform(0.10, 0.25) * np.sin(2 * np.pi * sweep)
            states[:, 1] += rng.uniform(0.02, 0.08) * np.sin(2 * np.pi * sweep)
        case "jitter":
            at = 0
            while (at := at + max(1, round(rng.uniform(*_HOLD_SECONDS) * fps))) < len(steps):
                states[at:] = rng.random(3)
    return states % 1.0


def _sprite(rng: np.random.Generator, timeline: tuple[Motion, ...], fps: int, hue: float) -> Sprite:
    state = rng.random(3)
    parts = []
    for motion in timeline:
        parts.append(_move(rng, motion, fps, state))
        state = parts[-1][-1]
    x, y, size = np.concatenate(parts).T
    # Always light on dark: the sign of a brightness edge then tells the direction it moves in.
    luma = rng.uniform(180, 220)
    return Sprite(
        x=x,
        y=y,
        size=_RADIUS[0] + (_RADIUS[1] - _RADIUS[0]) * size,
        shape=str(rng.choice(_SHAPES)),
        colour=_colour(hue, luma, 110.0),
        texture=(rng.uniform(-4, 4), rng.uniform(-4, 4), rng.uniform(0, 2 * np.pi)),
    )


def _colour(hue: float, luma: float, chroma: float) -> Floats:
    pure = np.array(colorsys.hsv_to_rgb(hue, 1.0, 1.0))
    colour: Floats = np.clip(luma + chroma * (pure - pure @ _LUMA), 0, 255).astype(np.float32)
    return colour


def _backdrop(rng: np.random.Generator, side: int) -> Floats:
    """A periodic field of the lowest spatial frequencies around a base colour, tiled two by two."""
    spectrum = np.zeros((4, side, side), complex)
    waves = np.arange(-3, 4)
    fall_off = 1 / (1 + waves[:, None] ** 2 + waves[None, :] ** 2)
    draw = rng.normal(size=(4, 7, 7)) + 1j * rng.normal(size=(4, 7, 7))
    spectrum[:, waves[:, None], waves[None, :]] = draw * fall_off
    spectrum[:, 0, 0] = 0
    field = np.fft.ifft2(spectrum).real
    field = np.clip(field / field.std(axis=(1, 2), keepdims=True), -2, 2)
    luma = rng.uniform(55, 90)
    base = _colour(rng.random(), luma, 45.0)
    image = base + 12.0 * field[3][..., None] + 8.0 * np.moveaxis(field[:3], 0, -1)
    tiled: Floats = np.tile(image, (2, 2, 1)).astype(np.float32)
    return tiled


def _split_pixel(shift: float, side: int) -> tuple[int, float]:
    whole, part = divmod(shift % side, 1.0)
    return int(whole) % side, part


def _paint(image: Floats, sprite: Sprite, frame: int) -> None:
    side = image.shape[0]
    centres = (np.arange(side, dtype=np.float32) + 0.5) / side
    radius = float(sprite.size[frame])
    across = ((centres - sprite.x[frame] + 0.5) % 1.0 - 0.5).astype(np.float32)[None, :] / radius
    down = ((centres - sprite.y[frame] + 0.5) % 1.0 - 0.5).astype(np.float32)[:, None] / radius
    # Distances are 1 on the rim, and all three shapes cover the disc's area.
    if sprite.shape == "disc":
        distance = np.sqrt(across**2 + down**2)
    elif sprite.shape == "square":
        distance = np.maximum(np.abs(across), np.abs(down)) * np.float32(2 / np.sqrt(np.pi))
    else:
        distance = (np.abs(across) + np.abs(down)) * np.float32(np.sqrt(2 / np.pi))
    edge_pixels = 1.5
    alpha = np.clip((1 - distance) * np.float32(radius * side / edge_pixels) + 0.5, 0, 1)[..., None]
    waves_x, waves_y, phase = sprite.texture
    shade = np.cos(across * waves_x + (down * waves_y + phase))[..., None]
    image += alpha * (sprite.colour + np.float32(16) * shade - image)


def _write_videos(
    directory: Path,
    config: SyntheticConfig,
    items: list[tuple[str, int]],
    total: int,
    progress: Callable[[int, int], None] | None,
    processes: int,
) -> None:
    report = progress if progress is not None else lambda done, total: None
    done = total - len(items)
    report(done, total)
    if processes <= 1 or len(items) <= 1:
        for subset, index in items:
            _write_video(directory, config, subset, index)
            report(done := done + 1, total)
        return
    with ProcessPoolExecutor(min(processes, len(items)), mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(_write_video, directory, config, *item) for item in items]
        try:
            for future in as_completed(futures):
                future.result()
                report(done := done + 1, total)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _write_video(directory: Path, config: SyntheticConfig, subset: str, index: int) -> None:
    drawn = scene(config, subset, index)
    final = directory / _file_name(subset, index)
    partial = final.with_name(f".{final.name}.{os.getpid()}.part")
    try:
        # Meant to be the same bits every time, on every processor. bitexact: no encoder version and no date
        # in the file; one thread; no assembly, the suspect where files once differed from run to run.
        with av.open(str(partial), "w", format="mp4", options={"fflags": "+bitexact"}) as container:
            options = {"crf": "18", "preset": "veryfast", "threads": "1", "x264-params": "asm=0"}
            stream = container.add_stream("libx264", rate=drawn.fps, options=options)
            stream.width = stream.height = drawn.side_pixels
            stream.pix_fmt = "yuv420p"
            stream.gop_size = 50
            for number in range(drawn.frames):
                picture = av.VideoFrame.from_ndarray(_yuv420(render(drawn, number)), format="yuv420p")
                picture.pts = number
                picture.time_base = Fraction(1, drawn.fps)
                container.mux(stream.encode(picture))
            container.mux(stream.encode())
        partial.replace(final)
    finally:
        partial.unlink(missing_ok=True)


def _yuv420(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """RGB (side, side, 3) as planar YUV 4:2:0 (1.5 side, side): BT.601, video range, mean chroma of 2 x 2.

    In integers, so that no processor's vector code, in ffmpeg or here, has a say in the rounding.
    """
    side = pixels.shape[0]
    luma, blue, red = np.moveaxis(pixels.astype(np.int32) @ _YUV_1024.T, -1, 0)
    planes = [(luma + 512) // 1024 + 16]
    for chroma in (blue, red):
        four = chroma.reshape(side // 2, 2, side // 2, 2).sum(axis=(1, 3))
        planes.append((four + 2048) // 4096 + 128)
    return np.concatenate([plane.ravel() for plane in planes]).astype(np.uint8).reshape(-1, side)


def _is_whole(path: Path, sizes: dict[str, int]) -> bool:
    """A file under its final name is complete; the manifest, once there, also says how long it is."""
    return path.is_file() and path.stat().st_size == sizes.get(path.name, path.stat().st_size)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text())
    except ValueError:
        raise SyntheticError(f"{path}: not valid JSON") from None
    if not isinstance(found, dict):
        raise SyntheticError(f"{path}: expected a mapping, got {type(found).__name__}")
    return found


def _write_json(path: Path, content: dict[str, Any]) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(path)
