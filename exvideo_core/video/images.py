"""The reference's picture preprocessing, latent post-processing and chunk blending (DiffSynth `svd_video`)."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from ..choices import Blend

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def rgb(image: torch.Tensor, name: str = "image") -> torch.Tensor:
    """Pictures of any floating-point type as float32 RGB: an alpha channel is dropped, grey becomes three channels.

    Args:
        image: [B, H, W, C] in 0..1, ComfyUI's IMAGE.
        name: of the input, for errors.

    Returns:
        [B, H, W, 3].

    Raises:
        ValueError: there is no picture, it has no such channels, or not all of its values are finite.
    """
    if image.ndim != 4 or 0 in image.shape:
        shape = list(image.shape)
        raise ValueError(
            f"{name} holds no picture: its shape is {shape}, expected [pictures, height, width, channels]."
        )
    if image.shape[-1] == 2:
        raise ValueError(f"{name} has 2 channels. Give it pictures of 1 (grey), 3 (RGB) or 4 channels (RGBA).")
    pixels = image[..., :3].float()
    if not torch.isfinite(pixels).all():
        raise ValueError(f"{name} holds NaN or infinite values. Look at the picture that goes in.")
    return pixels.expand(-1, -1, -1, 3)


def check_latents(samples: torch.Tensor, channels: int | None = None) -> None:
    """Check the latent of a clip [T, C, H, W] before it is worked on.

    Args:
        channels: that it has to have (default: any).

    Raises:
        ValueError: it is of another shape, or not all of its values are finite.
    """
    shape = list(samples.shape)
    if samples.ndim != 4 or 0 in shape:
        raise ValueError(f"The latent's shape is {shape}, expected [frames, channels, height, width]: use SVD's.")
    if channels is not None and shape[1] != channels:
        raise ValueError(f"The latent has {shape[1]} channels, and SVD's have {channels}: it is of another model.")
    if not torch.isfinite(samples).all():
        raise ValueError(
            "The latent holds NaN or infinite values: its sampling went wrong. Lower the guidance or the LoRA "
            "strengths, or start ComfyUI with --force-fp32 or --bf16-unet."
        )


def fit(image: torch.Tensor, width: int, height: int) -> torch.Tensor:
    """Scale a picture to cover width x height and cut the middle out, antialiased.

    Args:
        image: [B, H, W, C] in 0..1, ComfyUI's IMAGE.

    Returns:
        [B, height, width, 3] in 0..1, float32.

    Raises:
        ValueError: as of `rgb`.
    """
    pixels = rgb(image).movedim(-1, 1)
    if pixels.shape[-2:] != (height, width):
        scale = max(width / pixels.shape[-1], height / pixels.shape[-2])
        cut_w, cut_h = (min(round(n / scale), m) for n, m in zip((width, height), pixels.shape[:-3:-1], strict=True))
        left, top = (pixels.shape[-1] - cut_w) // 2, (pixels.shape[-2] - cut_h) // 2
        pixels = pixels[..., top : top + cut_h, left : left + cut_w]
        pixels = F.interpolate(pixels, size=(height, width), mode="bicubic", antialias=True).clamp(0, 1)
    return pixels.movedim(1, -1)


def clip_pixels(image: torch.Tensor, size: int = 224) -> torch.Tensor:
    """A picture as the reference shows it to CLIP: blurred against aliasing, resized whole, standardised.

    The blur is a Gaussian of deviation (factor - 1) / 2 over about 4 deviations, the resize a bicubic one with
    aligned corners. The host's own preprocessing crops, and rounds to 8 bits.

    Args:
        image: [B, H, W, 3] in 0..1.
        size: edge of the square that the vision model reads.

    Returns:
        [B, 3, size, size] in float32.
    """
    pixels = image.movedim(-1, 1).float() * 2 - 1
    for dim in (-1, -2):
        pixels = _blur(pixels, dim, pixels.shape[dim] / size)
    pixels = (F.interpolate(pixels, size=(size, size), mode="bicubic", align_corners=True) + 1) / 2
    mean, std = (torch.tensor(values, device=pixels.device).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    return (pixels - mean) / std


def _blur(pixels: torch.Tensor, dim: int, factor: float) -> torch.Tensor:
    """Gaussian blur along one dimension before a resize by 1 / factor."""
    sigma = max((factor - 1) / 2, 0.001)
    taps = int(max(4 * sigma, 3)) | 1
    offsets = torch.arange(taps, dtype=torch.float32, device=pixels.device) - taps // 2
    kernel = torch.exp(-(offsets**2) / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).expand(pixels.shape[1], 1, taps)
    kernel = kernel.unsqueeze(2 if dim == -1 else 3)
    half = taps // 2
    padding = (half, half, 0, 0) if dim == -1 else (0, 0, half, half)
    return F.conv2d(F.pad(pixels, padding, mode="reflect"), kernel, groups=pixels.shape[1])


def add_pixel_noise(image: torch.Tensor, strength: float, seed: int) -> torch.Tensor:
    """Noise augmentation: strength x noise on the picture's -1..1 scale, the same for the same seed everywhere.

    Args:
        image: [B, H, W, 3] in 0..1.

    Returns:
        the same shape, still on the 0..1 scale (hence half the strength), not clamped.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    batch, height, width, channels = image.shape
    noise = torch.randn(batch, channels, height, width, generator=generator)
    return image + noise.movedim(1, -1).to(image) * (strength / 2)


def normalize_latents(latents: torch.Tensor, normalize: bool, contrast: float) -> torch.Tensor:
    """Give every frame the clip's mean and deviation, then raise the contrast.

    Reference: `SVDVideoPipeline.post_process_latents`. It is linear in the latents' scale, so the host's unscaled
    latents serve as well. A frame of one value becomes the clip's mean, where the reference divides by zero.

    Args:
        latents: [T, C, H, W].
    """
    if normalize:
        mean, std = latents.mean(), latents.std()
        frame_mean = latents.mean(dim=(1, 2, 3), keepdim=True)
        frame_std = latents.std(dim=(1, 2, 3), keepdim=True)
        smallest = torch.finfo(latents.dtype).tiny
        latents = (latents - frame_mean) / frame_std.clamp_min(smallest) * std + mean
    return latents * contrast


def chunks(frames: int, size: int, overlap: int) -> Iterator[tuple[int, int]]:
    """Start and end of overlapping chunks that cover `frames`; the last may be shorter.

    Raises:
        ValueError: the overlap leaves no step.
    """
    if not 0 <= overlap < size:
        raise ValueError(f"overlap_frames ({overlap}) has to be smaller than chunk_frames ({size}).")
    start = 0
    while True:
        end = min(start + size, frames)
        yield start, end
        if end == frames:
            return
        start += size - overlap


def blend_weights(start: int, end: int, frames: int, overlap: int, blend: Blend) -> torch.Tensor:
    """Weight of each frame of a chunk where it is blended with its neighbours; none is lowered at the clip's ends.

    *linear* is the reference's: a ramp up from the chunk's start and down to its end, whatever the overlap.
    *smooth* leaves the outer third of the overlap out, where frames have few neighbours along time to be decoded by,
    and fades over the rest by squared sines, which sum to one.

    Returns:
        [end - start] in float32.
    """
    length = end - start
    position = torch.arange(length, dtype=torch.float32)
    if blend == "linear":
        most, rising = torch.full((length,), float(length)), position + 1
    else:
        left_out = overlap // 3
        fading = max(overlap - 2 * left_out, 1)
        most = torch.ones(length)
        rising = torch.sin(((position + 0.5 - left_out) / fading).clamp(0, 1) * (math.pi / 2)).square()
    return torch.minimum(rising if start > 0 else most, rising.flip(0) if end < frames else most)
