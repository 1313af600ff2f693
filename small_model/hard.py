"""Finds the training windows in which a model is most wrong, so that training can draw them more often.

What a trained small model still gets wrong are a few constellations of the two shapes, in which they exchange their
colors for some frames. Random windows rarely show one.
"""

from __future__ import annotations

import logging
from dataclasses import replace

import torch

from exvideo_core.post_tuning.loss import VideoUNet, denoise

from .bank import STRIDE, Bank
from .first_stage import SCALING

SIGMA = 6.0  # low enough for 128 frames to show which future it is, high enough for colors to be exchanged
_RUN = 8  # frames in a row whose mean error counts
_FPS = 30
_log = logging.getLogger("small_model")


@torch.no_grad()
def run_errors(
    unet: VideoUNet, bank: Bank, clip: torch.Tensor, place: torch.Tensor, frames: int, seed: int
) -> torch.Tensor:
    """Largest mean squared error of `_RUN` frames in a row after one denoising step from `SIGMA` [B].

    Args:
        unet: the UNet.
        bank: the clips.
        clip, place: the windows, as `Bank.windows` takes them [B].
        frames: per window; a multiple of `_RUN`.
        seed: seed of the noise.
    """
    windows = bank.windows(clip, place, frames)
    latents, device = windows.latents, windows.latents.device
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed)).to(device)
    ids = torch.stack([torch.full_like(windows.bucket, _FPS - 1.0), windows.bucket, windows.bucket * 0], dim=1)
    level = torch.full((len(latents),), SIGMA, device=device)
    clean = denoise(unet, latents + noise * SIGMA, level, latents[:, 0] / SCALING, windows.embedding, ids)
    return (clean - latents).square().mean((2, 3, 4)).unflatten(1, (-1, _RUN)).mean(2).amax(1)


def with_hard(bank: Bank, unet: VideoUNet, frames: int, count: int, kept: int, seed: int = 0, batch: int = 4) -> Bank:
    """The bank with the `kept` hardest of `count` random windows.

    Args:
        bank: the clips.
        unet: the UNet.
        frames: per window.
        count: number of windows that are compared; all of them, if the bank has fewer.
        kept: number of hard windows.
        seed: seed of the choice and of the noise.
        batch: windows per call of the UNet.
    """
    places = (bank.latents.shape[1] - frames) // STRIDE + 1
    chosen = torch.randperm(len(bank) * places, generator=torch.Generator().manual_seed(seed))[:count]
    chosen = chosen.to(bank.latents.device)
    parts = enumerate((some // places, some % places) for some in chosen.split(batch))
    errors = torch.cat([run_errors(unet, bank, *part, frames, seed + number) for number, part in parts])
    largest = errors.topk(kept)
    _log.info("errors of the %d hardest windows %.4f, of all %.4f", kept, largest.values.mean(), errors.mean())
    hardest = chosen[largest.indices]
    return replace(bank, hard=(hardest // places, hardest % places))
