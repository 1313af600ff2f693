"""A whole run, host's sampler and nodes against the reference's scheduler, guidance and post-processing."""

from __future__ import annotations

import comfy.sample
import torch

import reference
import svd
from exvideo_core.comfyui.apply.patch import apply_extension
from exvideo_core.video.latents import normalize_latents

FRAMES, HEIGHT, WIDTH, STEPS = 12, 16, 16, 10
SCALE = 0.18215


def test_whole_run_matches_the_reference() -> None:
    from comfy_extras.nodes_video_model import VideoLinearCFGGuidance

    pair = svd.make_pair()
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(FRAMES, 4, HEIGHT, WIDTH, generator=generator)
    embedding = torch.randn(1, svd.CONTEXT, generator=generator)
    picture = torch.randn(1, 4, HEIGHT, WIDTH, generator=generator)

    model = VideoLinearCFGGuidance().patch(apply_extension(pair.base, pair.extension), 2.0)[0]
    micro = {"motion_bucket_id": 127, "fps": 30, "augmentation_level": 0.02}
    positive = [[embedding[:, None], {**micro, "concat_latent_image": picture}]]
    negative = [[torch.zeros_like(embedding)[:, None], {**micro, "concat_latent_image": torch.zeros_like(picture)}]]
    latents = comfy.sample.sample(
        model, noise, STEPS, 2.0, "euler", "karras", positive, negative, torch.zeros_like(noise), seed=0
    )
    ours = normalize_latents(latents, True, 1.2) * SCALE

    expected = _reference_run(pair.reference(), noise, embedding, picture)
    error = svd.relative_error(ours, expected)
    print(f"relative error of the final latents {error:.2e}")
    assert error < 1e-4


def _reference_run(unet, noise, embedding, picture) -> torch.Tensor:
    scheduler = reference.module("schedulers.continuous_ode").ContinuousODEScheduler()
    scheduler.set_timesteps(STEPS)
    scales = torch.linspace(2.0, 2.0, FRAMES).reshape(FRAMES, 1, 1, 1)
    ids = torch.tensor([[29.0, 127.0, 0.02]])
    pictures = picture.expand(FRAMES, -1, -1, -1)
    latents = noise.clone()
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            yes = unet(torch.cat([latents, pictures], 1), timestep, embedding, ids)
            no = unet(torch.cat([latents, torch.zeros_like(pictures)], 1), timestep, torch.zeros_like(embedding), ids)
            latents = scheduler.step(no + scales * (yes - no), timestep, latents)
    mean, std = latents.mean(), latents.std()
    dims = (1, 2, 3)
    latents = (latents - latents.mean(dims, keepdim=True)) / latents.std(dims, keepdim=True) * std + mean
    return latents * 1.2
