"""Finds the training windows in which a model is most wrong, so that training can draw them more often."""

from __future__ import annotations

import logging
from dataclasses import replace

import torch

from exvideo_core.diffusers.checkpoint import SVD
from exvideo_core.post_tuning.loss import VideoUNet

from .bank import STRIDE, Bank
from .held_out import HeldOut

SIGMA = 6.0  # low enough for 128 frames to show which future it is, high enough for colors to be exchanged
_RUN = 8  # frames in a row whose mean error counts
_log = logging.getLogger("small_model")


def with_hard(
    bank: Bank, svd: SVD, unet: VideoUNet, frames: int, count: int, kept: int, seed: int = 0, batch: int = 4
) -> Bank:
    """The bank with the hardest of `count` random windows.

    A window is as hard as the run of `_RUN` frames in which one denoising step from `SIGMA` errs most.

    Args:
        bank: the clips.
        svd: the model whose VAE scales the latents.
        unet: the UNet.
        frames: per window; a multiple of `_RUN`.
        count: number of windows that are compared; all of them, if the bank has fewer.
        kept: number of hard windows.
        seed: seed of the choice and of the noise.
        batch: windows per call of the UNet.
    """
    places = (bank.latents.shape[1] - frames) // STRIDE + 1
    chosen = torch.randperm(len(bank) * places, generator=torch.Generator().manual_seed(seed))[:count]
    chosen = chosen.to(bank.latents.device)
    found = []
    for number, some in enumerate(chosen.split(batch)):
        windows = bank.windows(some // places, some % places, frames)
        wrong = HeldOut([], windows, svd).one_step(unet, SIGMA, seed + number) - windows.latents
        found.append(wrong.square().mean((2, 3, 4)).unflatten(1, (-1, _RUN)).mean(2).amax(1))
    errors = torch.cat(found)
    largest = errors.topk(kept)
    _log.info("errors of the %d hardest windows %.4f, of all %.4f", kept, largest.values.mean(), errors.mean())
    hardest = chosen[largest.indices]
    return replace(bank, hard=(hardest // places, hardest % places))
