"""Encoded clips of the synthetic world, from which training draws windows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from exvideo_core.video.images import clip_vision_pixels

from . import world
from .scenes import Scenes, as_read

if TYPE_CHECKING:
    from diffusers import AutoencoderKLTemporalDecoder
    from transformers import CLIPVisionModelWithProjection

STRIDE = 4  # frames between possible starts of a window
_AT_ONCE = 1024  # frames


@torch.no_grad()
def encode(
    vae: AutoencoderKLTemporalDecoder, scenes: Scenes, frames: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Draw and encode clips, a part of them at a time.

    Yields:
        pixels in -1..1 [n, F, 3, H, W] and scaled latents [n, F, 4, h, w].
    """
    times = torch.arange(frames, device=vae.device)
    for start in range(0, len(scenes), max(_AT_ONCE // frames, 1)):
        part = scenes[slice(start, start + max(_AT_ONCE // frames, 1))]
        pixels = as_read(part.draw(part.centers(times)))
        encoded = vae.encode(pixels.flatten(0, 1)).latent_dist.mode()
        yield pixels, encoded.unflatten(0, pixels.shape[:2]) * vae.config.scaling_factor


@dataclass(frozen=True)
class Windows:
    """A batch of windows, as the UNet reads them.

    Attributes:
        latents: scaled [B, T, 4, h, w].
        embedding: image embedding of the first frame [B, 1, D].
        bucket: motion bucket [B].
    """

    latents: torch.Tensor
    embedding: torch.Tensor
    bucket: torch.Tensor


@dataclass(frozen=True)
class Bank:
    """Encoded clips. A window may start anywhere in a clip: its shapes set out in the direction they move there.

    Attributes:
        latents: scaled [N, F, 4, h, w].
        embeddings: of every `STRIDE`th frame [N, ceil(F / STRIDE), D].
        buckets: [N].
        hard: clip and place of windows that are drawn for half of a batch, as `windows` takes them [K] (default: none).
    """

    latents: torch.Tensor
    embeddings: torch.Tensor
    buckets: torch.Tensor
    hard: tuple[torch.Tensor, torch.Tensor] | None = None

    @classmethod
    @torch.no_grad()
    def encode(
        cls,
        vae: AutoencoderKLTemporalDecoder,
        image_encoder: CLIPVisionModelWithProjection,
        seeds: range,
        frames: int,
    ) -> Bank:
        """Encode the clips of some seeds on the device of the models."""
        scenes = Scenes.of([world.sample(seed) for seed in seeds], vae.device)
        size = image_encoder.config.image_size
        latents, embeddings = [], []
        for pixels, encoded in encode(vae, scenes, frames):
            latents.append(encoded)
            firsts = (pixels[:, ::STRIDE] + 1).div(2).movedim(2, -1)
            for some in firsts.flatten(0, 1).split(_AT_ONCE // 4):
                embeddings.append(image_encoder(clip_vision_pixels(some, size)).image_embeds)
        told = torch.cat(embeddings).unflatten(0, (len(scenes), -1))
        return cls(torch.cat(latents).contiguous(), told, scenes.bucket)

    def __len__(self) -> int:
        return len(self.latents)

    def draw(self, count: int, frames: int, generator: torch.Generator, skips: torch.Tensor | None = None) -> Windows:
        """Draw windows of random clips with random starts.

        Args:
            count: number of windows.
            frames: frames per window.
            generator: a generator on the device of the bank.
            skips: distance of a window's frames in the clip [count] (default: 1).
        """
        device = self.latents.device
        skips = torch.ones(count, dtype=torch.long, device=device) if skips is None else skips
        places = (self.latents.shape[1] - 1 - (frames - 1) * skips) // STRIDE + 1
        clip = torch.randint(len(self), (count,), generator=generator, device=device)
        place = (torch.rand(count, generator=generator, device=device) * places).long()
        if self.hard is not None:
            chosen = torch.randint(len(self.hard[0]), (count,), generator=generator, device=device)
            replaced = torch.rand(count, generator=generator, device=device) < 0.5
            clip, place = (
                torch.where(replaced, hard[chosen], drawn) for hard, drawn in zip(self.hard, (clip, place), strict=True)
            )
        return self.windows(clip, place, frames, skips)

    def windows(
        self, clip: torch.Tensor, place: torch.Tensor, frames: int, skips: torch.Tensor | None = None
    ) -> Windows:
        """Windows of clips `clip` [B] that start at frames `place` * `STRIDE` [B], of every `skips`th frame [B]."""
        steps = torch.arange(frames, device=place.device).expand(len(place), -1)
        times = place[:, None] * STRIDE + (steps if skips is None else steps * skips[:, None])
        latents = self.latents[clip[:, None], times]
        return Windows(latents, self.embeddings[clip, place][:, None], self.buckets[clip])
