"""Recording a denoising, and the pictures of it, on the host's own samplers."""

from __future__ import annotations

import comfy.sample
import pytest
import torch

from exvideo_core.comfyui.apply.patch import apply_extension
from exvideo_core.comfyui.checkpoint.load import load_checkpoint
from exvideo_core.comfyui.inspect import denoising_sheet, measure_distances
from exvideo_core.comfyui.sampling.recording import Recording, record_sampling
from exvideo_core.comfyui.sampling.windows import WindowSettings, with_windows
from exvideo_core.comfyui.vae.decode import decode
from exvideo_core.method.extension import Extension

FRAMES, STEPS = 8, 6


@pytest.fixture(scope="module")
def loaded(small_models):
    checkpoint, extension = small_models
    model, _, vae = load_checkpoint(str(checkpoint))
    return model, vae, Extension.load(extension)


@pytest.fixture(scope="module")
def model(loaded):
    return apply_extension(loaded[0], loaded[2])


def sample(model, frames: int = FRAMES, steps: int = STEPS, seed: int = 0) -> torch.Tensor:
    latent = torch.zeros(frames, 4, 8, 8)
    noise = comfy.sample.prepare_noise(latent, seed)
    generator = torch.Generator().manual_seed(0)
    conditioning = [[torch.randn(1, 1, 64, generator=generator),
                     {"motion_bucket_id": 127, "fps": 30, "augmentation_level": 0.0,
                      "concat_latent_image": torch.randn(1, 4, 8, 8, generator=generator)}]]  # fmt: skip
    return comfy.sample.sample(model, noise, steps, 1.0, "euler", "karras", conditioning, conditioning, latent)


def test_the_last_recorded_step_is_the_result_and_sampling_stays_the_same(model) -> None:
    clone, recording = record_sampling(model, 3)
    result = sample(clone)
    assert result.equal(sample(model))
    run = recording.find_run(result)
    assert run.steps == STEPS and list(run.x0) == [2, 4, 6]
    # Euler's last step, to no noise, goes all the way to what the model takes the clip to be.
    assert torch.allclose(run.x0[STEPS], result, atol=1e-5)
    early, late = ((run.x0[step] - result).norm().item() for step in (2, 4))
    assert early > late > 0


def test_each_clip_keeps_the_run_that_made_it(model) -> None:
    """The host keeps a sampler's result while the same model samples other clips."""
    clone, recording = record_sampling(model, 64)
    first, second = sample(clone, seed=0), sample(clone, seed=1)
    shorter = sample(clone, FRAMES - 2, 2)
    again = sample(record_sampling(model, 64)[0], seed=0)
    assert first.equal(again)
    for result, seed in ((first, 0), (second, 1)):
        alone, other = record_sampling(model, 64)
        sample(alone, seed=seed)
        found, expected = recording.find_run(result).x0, other.find_run(result).x0
        assert list(found) == list(expected) == [1, 2, 3, 4, 5, 6]
        assert all(found[step].equal(expected[step]) for step in expected)
    assert list(recording.find_run(shorter).x0) == [1, 2]
    assert recording.find_run(first * 1.2 + 0.1) is recording.find_run(first)
    with pytest.raises(ValueError, match="No recorded run made this latent"):
        recording.find_run(torch.randn(first.shape))


def test_windows_are_recorded_as_the_clip_they_make(model) -> None:
    clone, recording = record_sampling(with_windows(model, WindowSettings(6, 2, "sequential")), 2)
    result = sample(clone, 10, 3)
    run = recording.find_run(result)
    assert torch.allclose(run.x0[run.steps], result, atol=1e-5)


def test_a_sheet_shows_the_frames_themselves(loaded, model) -> None:
    _, vae, _ = loaded
    clone, recording = record_sampling(model, 2)
    result = sample(clone)
    picture = denoising_sheet(vae, result, recording, 3, edge=64)
    alone = denoising_sheet(vae, result, None, 3, edge=64)
    assert picture.height == alone.height + 68  # the last step is the result, and shown once
    frame = (decode(vae, result, 24, 12, "smooth")[7] * 255).round().byte()
    corner = picture.crop((picture.width - 68, picture.height - 68, picture.width - 4, picture.height - 4))
    assert torch.tensor(list(corner.tobytes()), dtype=torch.uint8).view(64, 64, 3).equal(frame)


def test_frames_of_a_long_clip_are_decoded_among_their_neighbours(loaded) -> None:
    from small_model import recipe

    _, _, vae = load_checkpoint(str(recipe.CHECKPOINT))  # trained: what it makes of a frame alone has other colors
    torch.manual_seed(0)
    clip = torch.nn.functional.interpolate(torch.randn(1, 4, 10, 4, 4), (64, 8, 8), mode="trilinear")[0].movedim(1, 0)
    picture = denoising_sheet(vae, clip, None, 3, edge=64)
    whole = decode(vae, clip, 24, 12, "smooth")
    for column, index in enumerate((0, 32, 63)):
        left = picture.width - (3 - column) * 68
        shown = picture.crop((left, picture.height - 68, left + 64, picture.height - 4))
        pixels = torch.tensor(list(shown.tobytes()), dtype=torch.uint8).view(64, 64, 3) / 255
        near, alone = (
            (pixels - other).abs().mean() for other in (whole[index], decode(vae, clip[index][None], 1, 0, "linear")[0])
        )
        assert near < 0.02 and near < alone / 3


def test_a_recording_of_another_clip_is_refused(loaded, model) -> None:
    _, vae, _ = loaded
    clone, recording = record_sampling(model, 2)
    with pytest.raises(ValueError, match="empty"):
        denoising_sheet(vae, torch.zeros(FRAMES, 4, 8, 8), Recording(), 3, 64)
    sample(clone)
    with pytest.raises(ValueError, match="has a different size"):
        denoising_sheet(vae, torch.zeros(FRAMES + 1, 4, 8, 8), recording, 3, 64)


def test_distances_want_the_base_itself(loaded, model) -> None:
    base, _, extension = loaded
    assert measure_distances(extension)[0].weights is None
    assert all(distance.weights > 0 for distance in measure_distances(extension, base))
    with pytest.raises(ValueError, match="checkpoint's model"):
        measure_distances(extension, model)
