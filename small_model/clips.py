"""Makes clips of the synthetic world with a small SVD, and measures them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from exvideo_core.diffusers.sampling import decode, generate_video
from exvideo_core.post_tuning.loss import denoise
from exvideo_core.post_tuning.samples import Encoder

from . import measure, world

if TYPE_CHECKING:
    from exvideo_core.diffusers.checkpoint import SVD

FPS = 30
STEPS = 8  # denoising steps of a clip
SIGMAS = (1.0, 3.0, 10.0, 30.0, 100.0, 700.0)  # noise levels of the denoising curve


def make(svd: SVD, clip: world.Clip, frames: int, seed: int, steps: int = STEPS) -> np.ndarray:
    """A clip from a true first frame and its motion bucket, 0..1 [frames, H, W, 3]."""
    return _continue(svd, world.render(clip, 1), clip.motion_bucket, frames, seed, steps)


def make_in_windows(svd: SVD, clip: world.Clip, frames: int, window: int, seed: int, steps: int = STEPS) -> np.ndarray:
    """The same in windows of `window` frames, each going on from the last frame of the one before."""
    made = world.render(clip, 1)
    while len(made) < frames:
        part = _continue(svd, made[-1:], clip.motion_bucket, window, seed + len(made), steps)
        made = np.concatenate([made, part[1:]])
    return made[:frames]


def _continue(svd: SVD, picture: np.ndarray, bucket: int, frames: int, seed: int, steps: int) -> np.ndarray:
    video = generate_video(
        svd, torch.from_numpy(picture), frames=frames, fps=FPS, motion_bucket_id=bucket, steps=steps, seed=seed
    )
    return video.astype(np.float32) / 255


@torch.no_grad()
def denoising_errors(
    svd: SVD, seeds: range, frames: int, sigmas: tuple[float, ...] = SIGMAS
) -> dict[float, np.ndarray]:
    """Path error of one denoising step, by noise level and frame: what the model believes at that level.

    Returns:
        noise level -> [clips, frames], in picture widths.
    """
    scaling = svd.vae.config.scaling_factor
    encoder = Encoder(svd.vae, svd.image_encoder)
    found: dict[float, list[np.ndarray]] = {sigma: [] for sigma in sigmas}
    for seed in seeds:
        clip = world.sample(seed)
        pictures = world.as_bytes(world.render(clip, frames))
        latents, embedding = encoder.latents(pictures)[None], encoder.embeddings(pictures[:1])[None]
        ids = torch.tensor([[FPS - 1.0, float(clip.motion_bucket), 0.0]])
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed))
        for sigma in sigmas:
            level = torch.tensor([sigma])
            clean = denoise(svd.unet, latents + noise * sigma, level, latents[:, 0] / scaling, embedding, ids)
            sighting = measure.sight(clip, decode(svd, clean[0]))
            found[sigma].append(measure.path_error(sighting, clip).mean(1))
    return {sigma: np.stack(errors) for sigma, errors in found.items()}
