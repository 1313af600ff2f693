"""Evaluation on held-out clips: denoising errors by noise level, and measures of generated videos."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from exvideo_core.diffusers.checkpoint import SVD
from exvideo_core.diffusers.sampling import decode
from exvideo_core.method.noise_levels import SIGMA_MAX
from exvideo_core.post_tuning.loss import VideoUNet, denoise, sigma_ramp

from . import measure, world
from .bank import Bank, Windows, encode
from .figures import of_clip
from .scenes import Scenes

FPS = 30
SIGMAS = (0.2, 0.5, 1.0, 3.0, 10.0, 30.0, 100.0, 700.0)  # of the denoising curve
_AT_ONCE = 32  # clips


@dataclass(frozen=True)
class HeldOut:
    """Held-out clips, encoded.

    Attributes:
        clips: the N clips.
        windows: their latents, embeddings and motion buckets.
        svd: the model whose VAE and image encoder are used.
    """

    clips: list[world.Clip]
    windows: Windows
    svd: SVD

    @classmethod
    def of(cls, svd: SVD, count: int, frames: int, first_seed: int = world.HELD_OUT) -> HeldOut:
        seeds = range(first_seed, first_seed + count)
        bank = Bank.encode(svd.vae, svd.image_encoder, seeds, frames)
        every = torch.arange(count, device=bank.latents.device)
        return cls([world.sample(seed) for seed in seeds], bank.windows(every, torch.zeros_like(every), frames), svd)

    def _condition(self, part: slice, augmentation: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Latents of the first frames (not scaled), embeddings and ids of a part of the clips."""
        bucket = self.windows.bucket[part]
        ids = torch.stack([torch.full_like(bucket, FPS - 1.0), bucket, torch.full_like(bucket, augmentation)], dim=1)
        first = self.windows.latents[part, 0] / self.svd.vae.config.scaling_factor
        return first, self.windows.embedding[part], ids

    def _noise(self, seed: int) -> torch.Tensor:
        """Noise that does not depend on the device [N, T, 4, h, w]."""
        latents = self.windows.latents
        return torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed)).to(latents.device)

    @torch.no_grad()
    def one_step(self, unet: VideoUNet, sigma: float, seed: int = 0) -> torch.Tensor:
        """The clean latents that a UNet predicts at one noise level [N, T, 4, h, w]."""
        noise, found = self._noise(seed), []
        for start in range(0, len(noise), _AT_ONCE):
            part = slice(start, start + _AT_ONCE)
            noisy = self.windows.latents[part] + noise[part] * sigma
            level = torch.full((len(noisy),), sigma, device=noisy.device)
            found.append(denoise(unet, noisy, level, *self._condition(part, 0.0)))
        return torch.cat(found)

    @torch.no_grad()
    def ideal(self, sigma: float, seed: int = 0) -> torch.Tensor:
        """What a perfect model would predict at one noise level: the mean of the possible futures [N, T, 4, h, w].

        Weighted by their probability given the noisy latents, this mean has the smallest expected squared error.
        """
        latents, noise = self.windows.latents, self._noise(seed)
        found = []
        for clip, true, own in zip(self.clips, latents, noise, strict=True):
            headings = itertools.product(world.HEADINGS, repeat=world.LANES)
            scenes = Scenes.of([replace(clip, heading=np.array(heading)) for heading in headings], true.device)
            futures = torch.cat([encoded for _, encoded in encode(self.svd.vae, scenes, len(true))])
            distances = (true + own * sigma - futures).square().flatten(1).sum(1, dtype=torch.float64)
            weights = torch.softmax(-distances / (2 * sigma**2), dim=0).to(true)
            found.append((weights.view(-1, 1, 1, 1, 1) * futures).sum(0))
        return torch.stack(found)

    def errors(self, denoised: torch.Tensor) -> np.ndarray:
        """Mean squared error of latents [N, T, 4, h, w] by clip [N]."""
        return (denoised - self.windows.latents).square().flatten(1).mean(1).cpu().numpy()

    @torch.no_grad()
    def make(
        self, unet: VideoUNet, steps: int, seed: int = 0, done: Callable[[int], None] | None = None
    ) -> torch.Tensor:
        """Generate videos from the first frames with Euler steps over Karras noise levels.

        Args:
            unet: the UNet.
            steps: number of UNet calls. A single call returns the mean of the predicted futures.
            seed: seed of the noise.
            done: called with the index of each finished step.

        Returns:
            latents [N, T, 4, h, w].
        """
        sigmas = [*sigma_ramp(steps).tolist(), 0.0] if steps > 1 else [SIGMA_MAX, 0.0]
        noise, made = self._noise(seed), []
        for start in range(0, len(self.clips), _AT_ONCE):
            part = slice(start, start + _AT_ONCE)
            condition = self._condition(part, 0.0)
            x = noise[part] * sigmas[0]
            for index, (sigma, following) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
                level = torch.full((len(x),), sigma, device=x.device)
                clean = denoise(unet, x, level, *condition)
                x = clean + (x - clean) * (following / sigma)
                if done:
                    done(index)
            made.append(x)
        return torch.cat(made)

    def decode(self, latents: torch.Tensor, count: int | None = None) -> list[np.ndarray]:
        """Decode the first `count` clips: [T, H, W, 3] in 0..1 each."""
        return [video for some in latents[:count].split(_AT_ONCE) for video in decode(self.svd, some)]

    def figures(self, videos: list[np.ndarray]) -> dict[str, float]:
        """Measure generated videos; see `summary`."""
        return summary(self.clips, videos)


def summary(clips: list[world.Clip], videos: list[np.ndarray]) -> dict[str, float]:
    """Means over videos: the figures of `of_clip`, strength of color, correct kinds, and headings to the right."""
    found: dict[str, list[float]] = {}
    for clip, video in zip(clips, videos, strict=False):
        measured = of_clip(clip, video)
        sighting = measured.sighting
        figures = {
            **measured.values,
            "strength": sighting.strength.mean(),
            "kind": (measure.kinds(clip, video, sighting) == clip.kind).mean(),
            "right": measured.to_the_right / world.LANES,
        }
        for name, value in figures.items():
            found.setdefault(name, []).append(float(value))
    return {name: float(np.nanmean(values)) for name, values in found.items()}


def curve(held: HeldOut, unet: VideoUNet, decoded: int = 0) -> list[dict[str, float]]:
    """Errors of one denoising step by noise level.

    Args:
        held: the clips.
        unet: the UNet.
        decoded: number of clips to decode and measure as well.
    """
    rows = []
    for sigma in SIGMAS:
        clean = held.one_step(unet, sigma)
        row = {"sigma": sigma, "mse": float(held.errors(clean).mean())}
        if decoded:
            row |= held.figures(held.decode(clean, decoded))
        rows.append(row)
    return rows


def show(rows: list[dict[str, float]]) -> str:
    """Format rows of figures as lines of text."""
    return "\n".join(" ".join(f"{name} {value:.4g}" for name, value in row.items()) for row in rows)
