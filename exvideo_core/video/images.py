"""Image preprocessing, as in the reference (DiffSynth `svd_video`)."""

from __future__ import annotations

import torch
from torch.nn import functional

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def rgb(image: torch.Tensor, name: str = "image") -> torch.Tensor:
    """Convert images of any floating-point dtype to float32 RGB: alpha is dropped, gray is expanded.

    Args:
        image: [B, H, W, C] in 0..1, ComfyUI's IMAGE.
        name: name of the input, for error messages.

    Returns:
        [B, H, W, 3] in float32.

    Raises:
        ValueError: the tensor is empty, has two channels, or contains NaN or infinite values.
    """
    if image.ndim != 4 or 0 in image.shape:
        shape = list(image.shape)
        raise ValueError(f"{name} contains no image: its shape is {shape}, expected [images, height, width, channels].")
    if image.shape[-1] == 2:
        raise ValueError(f"{name} has 2 channels. Connect images with 1 (gray), 3 (RGB) or 4 channels (RGBA).")
    pixels = image[..., :3].float()
    if not torch.isfinite(pixels).all():
        raise ValueError(f"{name} contains NaN or infinite values. Check the connected image.")
    return pixels.expand(-1, -1, -1, 3)


def resize_and_crop(image: torch.Tensor, width: int, height: int) -> torch.Tensor:
    """Resize images to cover width x height and crop the center, with antialiasing and bicubic interpolation.

    Args:
        image: [B, H, W, C] in 0..1, ComfyUI's IMAGE.

    Returns:
        [B, height, width, 3] in 0..1, float32.

    Raises:
        ValueError: as `rgb`.
    """
    pixels = rgb(image).movedim(-1, 1)
    if pixels.shape[-2:] != (height, width):
        scale = max(width / pixels.shape[-1], height / pixels.shape[-2])
        cut_w, cut_h = (min(round(n / scale), m) for n, m in zip((width, height), pixels.shape[:-3:-1], strict=True))
        left, top = (pixels.shape[-1] - cut_w) // 2, (pixels.shape[-2] - cut_h) // 2
        pixels = pixels[..., top : top + cut_h, left : left + cut_w]
        pixels = functional.interpolate(pixels, size=(height, width), mode="bicubic", antialias=True).clamp(0, 1)
    return pixels.movedim(1, -1)


def clip_vision_pixels(image: torch.Tensor, size: int = 224) -> torch.Tensor:
    """Prepare images for CLIP as the reference does: blurred against aliasing, resized without cropping, normalized.

    The blur is a Gaussian with a standard deviation of (factor - 1) / 2, about 4 deviations wide; the resize is bicubic
    with aligned corners. ComfyUI's own preprocessing crops, and rounds to 8 bits.

    Args:
        image: [B, H, W, 3] in 0..1.
        size: input size of the vision model.

    Returns:
        [B, 3, size, size] in float32.
    """
    pixels = image.movedim(-1, 1).float() * 2 - 1
    for dim in (-1, -2):
        pixels = _blur(pixels, dim, pixels.shape[dim] / size)
    pixels = (functional.interpolate(pixels, size=(size, size), mode="bicubic", align_corners=True) + 1) / 2
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
    return functional.conv2d(functional.pad(pixels, padding, mode="reflect"), kernel, groups=pixels.shape[1])


def add_pixel_noise(image: torch.Tensor, strength: float, seed: int) -> torch.Tensor:
    """Noise augmentation: adds strength x noise on a -1..1 scale, reproducible from the seed on any device.

    Args:
        image: [B, H, W, 3] in 0..1.
        strength: standard deviation of the noise on the -1..1 scale.
        seed: seed of the noise.

    Returns:
        [B, H, W, 3] on the 0..1 scale (hence half the strength), not clamped.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    batch, height, width, channels = image.shape
    noise = torch.randn(batch, channels, height, width, generator=generator)
    return image + noise.movedim(1, -1).to(image) * (strength / 2)
