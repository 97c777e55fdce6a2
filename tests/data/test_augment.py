from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from pbd_ray.config import GridConfig
from pbd_ray.data.augment import inference_clip, training_clip

KINDS = ("full", "flip", "none")


def grid(kind: str = "full", crop: int = 32) -> GridConfig:
    return GridConfig.model_validate({"augmentation": kind, "crop_pixels": crop})


def noise(frames: int = 4, height: int = 40, width: int = 60) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (frames, height, width, 3), np.uint8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("height", "width"), [(40, 60), (60, 40), (32, 32), (31, 90), (20, 15), (33, 32)])
def test_shape_and_type(kind: str, height: int, width: int) -> None:
    frames = noise(3, height, width)
    for clip in (inference_clip(frames, grid(kind)), training_clip(frames, grid(kind), seed=1)):
        assert clip.shape == (3, 3, 32, 32) and clip.dtype == torch.uint8


def test_centre_crop_is_the_middle() -> None:
    frames = noise(5, 40, 60)
    expected = frames[:, 4:36, 14:46].transpose(3, 0, 1, 2)
    assert np.array_equal(inference_clip(frames, grid()).numpy(), expected)
    assert np.array_equal(training_clip(frames, grid("none"), seed=9).numpy(), expected)


def test_flip_mirrors_half_of_the_clips() -> None:
    frames = noise(2, 32, 32)
    plain = torch.from_numpy(frames.transpose(3, 0, 1, 2).copy())
    mirrored = 0
    for seed in range(200):
        clip = training_clip(frames, grid("flip"), seed)
        flipped = torch.equal(clip, plain.flip(-1))
        assert flipped or torch.equal(clip, plain)
        mirrored += flipped
    assert 70 <= mirrored <= 130


def test_too_small_frames_are_enlarged_and_not_padded() -> None:
    frames = np.full((2, 10, 16, 3), 200, np.uint8)
    for clip in (inference_clip(frames, grid()), training_clip(frames, grid("flip"), seed=0)):
        assert (clip == 200).all()
    # the whole short side stays in view
    frames[:, 0] = 0
    assert inference_clip(frames, grid())[:, :, 0].float().mean() < 50


@pytest.mark.parametrize("seed", range(60))
def test_every_frame_of_a_clip_is_treated_alike(seed: int) -> None:
    """Frames that are equal stay equal, whatever is drawn."""
    frames = np.repeat(noise(1), 4, axis=0)
    clip = training_clip(frames, grid("full"), seed)
    assert (clip == clip[:, :1]).all()


def test_a_seed_decides_everything() -> None:
    frames = noise()
    clips = [training_clip(frames, grid("full"), seed) for seed in range(20)]
    torch.manual_seed(123)
    np.random.seed(5)
    again = [training_clip(frames, grid("full"), seed) for seed in range(20)]
    assert all(torch.equal(a, b) for a, b in zip(clips, again, strict=True))
    assert len({clip.numpy().tobytes() for clip in clips}) == 20


def test_threads_that_augment_at_once() -> None:
    """Draw what each would draw alone, though they share torch's generator."""
    frames, seeds = noise(), range(60)
    alone = [training_clip(frames, grid(), seed) for seed in seeds]
    before = torch.get_rng_state()
    with ThreadPoolExecutor(4) as pool:
        at_once = list(pool.map(lambda seed: training_clip(frames, grid(), seed), seeds))
    assert all(torch.equal(a, b) for a, b in zip(alone, at_once, strict=True))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("seed", [0, 1, 2**63, 2**64 - 1])
@pytest.mark.parametrize("kind", KINDS)
def test_the_global_generator_is_untouched(kind: str, seed: int) -> None:
    torch.manual_seed(42)
    before = torch.get_rng_state()
    training_clip(noise(), grid(kind), seed)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_input_is_untouched() -> None:
    frames = noise(2, 32, 32)
    before = frames.copy()
    frames.flags.writeable = False
    for kind in KINDS:
        training_clip(frames, grid(kind), seed=3)
    assert np.array_equal(frames, before)


def test_jitter_moves_colours_and_places() -> None:
    frames = noise(2, 48, 48)
    centre = inference_clip(frames, grid()).float()
    changed = [
        (training_clip(frames, grid("full"), seed).float() - centre).abs().mean() for seed in range(10)
    ]
    assert min(changed) > 1
