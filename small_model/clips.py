"""Makes clips of the synthetic world with a small SVD."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from exvideo_core.diffusers.sampling import Sampler, generate_videos

from . import world
from .recipe import GUIDANCE

if TYPE_CHECKING:
    from exvideo_core.diffusers.checkpoint import SVD

FPS = 30


@dataclass(frozen=True)
class Sampling:
    """How clips are sampled. The defaults are those of the reference's example, in half as many steps.

    Attributes:
        steps: denoising steps.
        sampler: the sampler.
        guidance: classifier-free guidance scale.
    """

    steps: int = 25
    sampler: Sampler = "euler"
    guidance: float = GUIDANCE


def make(
    svd: SVD,
    clips: Sequence[world.Clip],
    frames: int,
    seeds: Sequence[int],
    sampling: Sampling = Sampling(),
    noise: torch.Tensor | None = None,
) -> list[np.ndarray]:
    """Clips from their true first frames and motion buckets, 0..1 [frames, H, W, 3] each.

    Args:
        svd: the model.
        clips: the true clips, which are made at once where their motion buckets are the same.
        frames: length.
        seeds: one per clip.
        sampling: steps, sampler and guidance.
        noise: initial noise instead of the seeds' [N, frames, 4, h, w].
    """
    firsts = np.concatenate([world.render(clip, 1) for clip in clips])
    return list(_continue(svd, firsts, clips, frames, seeds, sampling, noise))


def make_in_windows(
    svd: SVD,
    clips: Sequence[world.Clip],
    frames: int,
    window: int,
    seeds: Sequence[int],
    sampling: Sampling = Sampling(),
) -> list[np.ndarray]:
    """The same in windows of `window` frames, each going on from the last frame of the one before."""
    made = np.stack([world.render(clip, 1) for clip in clips])
    while made.shape[1] < frames:
        part = _continue(svd, made[:, -1], clips, window, [seed + made.shape[1] for seed in seeds], sampling)
        made = np.concatenate([made, part[:, 1:]], axis=1)
    return list(made[:, :frames])


def _continue(
    svd: SVD,
    images: np.ndarray,
    clips: Sequence[world.Clip],
    frames: int,
    seeds: Sequence[int],
    sampling: Sampling,
    noise: torch.Tensor | None = None,
) -> np.ndarray:
    """Videos from first frames [N, H, W, 3], in batches of clips with the same motion bucket."""
    made = np.zeros((len(clips), frames, *images.shape[1:]), np.float32)
    for bucket in sorted({clip.motion_bucket for clip in clips}):
        some = [index for index, clip in enumerate(clips) if clip.motion_bucket == bucket]
        videos = generate_videos(
            svd, torch.from_numpy(images[some]), seeds=[seeds[index] for index in some], frames=frames, fps=FPS,
            motion_bucket_id=bucket, steps=sampling.steps, sampler=sampling.sampler,
            guidance=(sampling.guidance, sampling.guidance), noise=None if noise is None else noise[some],
        )  # fmt: skip
        made[some] = videos.astype(np.float32) / 255
    return made
