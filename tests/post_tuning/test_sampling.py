"""Sampling with diffusers."""

from __future__ import annotations

import numpy as np
import torch

from small_model import recipe, world


def test_lcm_adds_the_noise_of_the_next_level_to_the_clean_prediction() -> None:
    from exvideo_core.diffusers.sampling import EDMLCMScheduler

    scheduler = EDMLCMScheduler(use_karras_sigmas=True, prediction_type="v_prediction", sigma_min=0.01, sigma_max=80.0)
    scheduler.set_timesteps(3)
    scheduler.generators = [torch.Generator().manual_seed(seed) for seed in (4, 5)]
    noise = torch.stack([torch.randn(2, 3, generator=torch.Generator().manual_seed(seed)) for seed in (4, 5)])
    x = torch.randn(2, 2, 3, generator=torch.Generator().manual_seed(0))
    sigma, following, *_, end = scheduler.sigmas.tolist()
    predicted = torch.randn(2, 2, 3, generator=torch.Generator().manual_seed(1))
    # EDM with SVD's v-prediction: D = x / (sigma^2 + 1) - v sigma / sqrt(sigma^2 + 1).
    clean = x / (sigma**2 + 1) - predicted * sigma / (sigma**2 + 1) ** 0.5
    result = scheduler.step(predicted, scheduler.timesteps[0], x)
    assert torch.allclose(result.pred_original_sample, clean, atol=1e-6)
    assert torch.allclose(result.prev_sample, clean + following * noise, atol=1e-5)
    scheduler.step(predicted, scheduler.timesteps[1], x)
    last = scheduler.step(predicted, scheduler.timesteps[2], x)
    assert end == 0 and torch.equal(last.prev_sample, last.pred_original_sample)


def test_a_video_does_not_depend_on_those_made_with_it() -> None:
    from exvideo_core.diffusers import checkpoint
    from small_model import clips

    svd = checkpoint.load(recipe.CHECKPOINT)
    first, second = (world.sample(seed) for seed in _of_one_bucket(2))
    sampling = clips.Sampling(2, "lcm", 1.0)
    both = clips.make(svd, [first, second], 3, [7, 8], sampling)
    alone = clips.make(svd, [second], 3, [8], sampling)[0]
    other = clips.make(svd, [second], 3, [9], sampling)[0]
    # In a batch, float32 sums are in another order: a level of brightness of 255 or two.
    assert np.abs(both[1] - alone).max() < 0.02
    assert np.abs(other - alone).max() > 0.02


def _of_one_bucket(count: int) -> list[int]:
    bucket = world.sample(0).motion_bucket
    return [seed for seed in range(100) if world.sample(seed).motion_bucket == bucket][:count]
