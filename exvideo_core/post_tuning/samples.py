"""Training samples: clips and noise, determined by the seed and the sample's index.

Random generators are not shared between samples, so that resumed runs and runs in several processes see the same
samples as an uninterrupted run in one process.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..video.images import clip_vision_pixels
from .config import Config, ConfigError
from .loss import RAMP_STEPS
from .motion import motion_bucket
from .noise import noise_levels
from .videos import Video, read_window

if TYPE_CHECKING:
    from diffusers import AutoencoderKLTemporalDecoder
    from transformers import CLIPVisionModelWithProjection

_BATCH_FRAMES = 8
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sample:
    """A training clip, or a batch of B clips.

    Attributes:
        latents: scaled by the VAE's factor [B, T, 4, H, W].
        noise: [B, T, 4, H, W].
        sigma: noise level [B].
        first: latents of the first frame, not scaled [B, 4, H, W].
        embedding: image embedding of the first frame [B, 1, D].
        ids: fps - 1, motion bucket and noise augmentation (0, as in the reference) [B, 3].
    """

    latents: torch.Tensor
    noise: torch.Tensor
    sigma: torch.Tensor
    first: torch.Tensor
    embedding: torch.Tensor
    ids: torch.Tensor

    def to(self, device: torch.device) -> Sample:
        """Copy all tensors to a device."""
        return Sample(**{name: value.to(device) for name, value in vars(self).items()})

    @classmethod
    def batch(cls, samples: Sequence[Sample]) -> Sample:
        """Concatenate samples into one batch."""
        return cls(*(torch.cat(parts) for parts in zip(*(vars(sample).values() for sample in samples), strict=True)))


@dataclass(frozen=True)
class Encoder:
    """SVD's VAE and image encoder."""

    vae: AutoencoderKLTemporalDecoder
    image_encoder: CLIPVisionModelWithProjection

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the encoders' weights, which identifies caches of the same model."""
        digest = hashlib.sha256()
        for module in (self.vae.encoder, self.vae.quant_conv, self.image_encoder):
            for name, value in module.state_dict().items():
                digest.update(name.encode())
                digest.update(value.detach().float().cpu().contiguous().numpy())
        return digest.hexdigest()

    @torch.no_grad()
    def latents(self, frames: torch.Tensor) -> torch.Tensor:
        """Encode uint8 images [N, H, W, 3] as scaled latents [N, 4, H/8, W/8], float32 on the CPU."""
        parts = []
        for part in frames.split(_BATCH_FRAMES):
            pixels = _pixels(part).to(self.vae.device, self.vae.dtype)
            parts.append(self.vae.encode(pixels).latent_dist.mode().float().cpu())
        return (torch.cat(parts) * self.vae.config.scaling_factor).contiguous()

    @torch.no_grad()
    def embeddings(self, frames: torch.Tensor) -> torch.Tensor:
        """Encode uint8 images [N, H, W, 3] as image embeddings [N, D], float32 on the CPU."""
        parts = []
        for part in frames.split(_BATCH_FRAMES):
            size = self.image_encoder.config.image_size
            pixels = clip_vision_pixels(part.float() / 255, size)
            embedded = self.image_encoder(pixels.to(self.image_encoder.device, self.image_encoder.dtype)).image_embeds
            parts.append(embedded.float().cpu())
        return torch.cat(parts)


def _pixels(frames: torch.Tensor) -> torch.Tensor:
    """Convert uint8 images [N, H, W, 3] to -1..1 [N, 3, H, W]."""
    return frames.permute(0, 3, 1, 2).float() / 127.5 - 1


class Samples:
    """The samples of a run, by index.

    Args:
        videos: the training videos.
        config: settings of the run.
        encoder: encodes clips on demand if there is no cache.
        cache: folder of encoded videos, see `fill_cache`, or None.
    """

    def __init__(self, videos: tuple[Video, ...], config: Config, encoder: Encoder, cache: Path | None) -> None:
        self.videos = list(videos)
        self.config = config
        self.encoder = encoder
        self.cache = cache
        self.levels = noise_levels(
            config.noise, low=config.noise_low, high=config.noise_high, mean=config.noise_mean,
            deviation=config.noise_deviation, share=config.noise_share,
        )  # fmt: skip
        self.dropped: list[tuple[Path, str]] = []

    def __getitem__(self, index: int) -> Sample:
        """Sample `index`. If its video cannot be decoded, another video is drawn.

        Raises:
            ConfigError: none of the videos can be decoded.
        """
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + index)
        while True:
            video = self.videos[_draw(generator, len(self.videos))]
            start = _draw(generator, video.frames - self.config.span + 1)
            try:
                latents, embedding, bucket = self._window(video, start)
                break
            except (ValueError, OSError) as error:
                if any(path == video.path for path, _ in self.dropped):
                    continue  # broken videos stay in the list, so that later samples do not change
                self.dropped.append((video.path, str(error)))
                _log.warning("Skipped from now on: %s", error)
                if len(self.dropped) == len(self.videos):
                    raise ConfigError("data: none of the videos can be decoded anymore.") from error
        sigma = self.levels[_draw(generator, RAMP_STEPS)][None]
        noise = torch.randn(latents.shape, generator=generator)
        scaling = self.encoder.vae.config.scaling_factor
        ids = torch.tensor([[float(self.config.fps - 1), float(bucket), 0.0]])
        return Sample(latents[None], noise[None], sigma, latents[:1] / scaling, embedding[None, None], ids)

    def _window(self, video: Video, start: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        config = self.config
        if self.cache is not None:
            from safetensors import safe_open

            with safe_open(_cache_file(self.cache, video.path, config, self.encoder), "pt") as file:
                latents = file.get_slice("latents")[start : start + config.span][:: config.interval]
                embedding = file.get_slice("embeddings")[start]
                bucket = int(file.get_slice("buckets")[start])
        else:
            frames = read_window(video.path, start, config.frames, config.interval, config.width, config.height)
            latents = self.encoder.latents(frames)
            embedding = self.encoder.embeddings(frames[:1])[0]
            bucket = motion_bucket(_pixels(frames))
        return latents, embedding, self._bucket(video, bucket)

    def _bucket(self, video: Video, measured: int) -> int:
        if self.config.motion_bucket_id >= 0:
            return self.config.motion_bucket_id
        return measured if video.motion_bucket is None else video.motion_bucket


def _draw(generator: torch.Generator, below: int) -> int:
    return int(torch.randint(below, (), generator=generator))


def _cache_file(cache: Path, path: Path, config: Config, encoder: Encoder) -> Path:
    """Cache file of a video. Its name depends on everything that affects its content: video, model and settings."""
    stat = path.stat()
    video = (str(path.resolve()), stat.st_size, stat.st_mtime_ns)
    settings = (encoder.fingerprint, config.width, config.height, config.span, config.interval)
    key = hashlib.sha256(repr((video, settings)).encode()).hexdigest()[:24]
    return cache / f"{key}.safetensors"


def fill_cache(
    cache: Path, videos: tuple[Video, ...], config: Config, encoder: Encoder, share: tuple[int, int] = (0, 1)
) -> Iterator[tuple[Video, str]]:
    """Encode all videos that are not in the cache yet, in full length, so that any clip can be taken from them.

    Args:
        cache: folder of the cache.
        videos: the training videos.
        config: settings of the run.
        encoder: encodes the frames.
        share: (i, n) encodes only videos i, i + n, ..., for n processes that fill one cache.

    Yields:
        (video, error message or "") for each video when it is finished.
    """
    from safetensors.torch import save_file

    cache.mkdir(parents=True, exist_ok=True)
    for video in videos[share[0] :: share[1]]:
        target = _cache_file(cache, video.path, config, encoder)
        if not target.exists():
            try:
                frames = read_window(video.path, 0, video.frames, 1, config.width, config.height)
            except ValueError as error:
                yield video, str(error)
                continue
            starts = range(video.frames - config.span + 1)
            content = {
                "latents": encoder.latents(frames),
                "embeddings": encoder.embeddings(frames[: len(starts)]),
                "buckets": torch.tensor(
                    [motion_bucket(_pixels(frames[s : s + config.span : config.interval])) for s in starts]
                ),
            }
            write_atomically(target, lambda part, content=content: save_file(content, part))
        yield video, ""


def write_atomically(target: Path, write: Callable[[Path], None]) -> None:
    """Write a temporary file next to `target`, then rename it, so that `target` is never incomplete.

    Args:
        target: the file.
        write: writes the given temporary file.
    """
    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        write(part)
        with part.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)
