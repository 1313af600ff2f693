"""Checks and post-processing of a video's latents, as in the reference (DiffSynth `svd_video`)."""

from __future__ import annotations

import torch


def check_latents(samples: torch.Tensor, channels: int | None = None) -> None:
    """Check the latent of a video.

    Args:
        samples: [T, C, H, W].
        channels: required number of channels C (default: any).

    Raises:
        ValueError: the shape is wrong, or the latent contains NaN or infinite values.
    """
    shape = list(samples.shape)
    if samples.ndim != 4 or 0 in shape:
        raise ValueError(
            f"The latent has shape {shape}, expected [frames, channels, height, width]. Connect a latent from SVD."
        )
    if channels is not None and shape[1] != channels:
        raise ValueError(f"The latent has {shape[1]} channels, but SVD's have {channels}. It belongs to another model.")
    if not torch.isfinite(samples).all():
        raise ValueError(
            "The latent contains NaN or infinite values: sampling has diverged. Lower the guidance or the LoRA "
            "strengths, or start ComfyUI with --force-fp32 or --bf16-unet."
        )


def normalize_latents(latents: torch.Tensor, normalize: bool, contrast: float) -> torch.Tensor:
    """Give every frame the video's mean and standard deviation, then scale the contrast.

    Reference: `SVDVideoPipeline.post_process_latents`. It is linear in the latents' scale, so it works on ComfyUI's
    unscaled latents as well. A constant frame becomes the video's mean, where the reference divides by zero.

    Args:
        latents: [T, C, H, W].
        normalize: whether to match mean and standard deviation.
        contrast: factor for all latents.

    Returns:
        [T, C, H, W].
    """
    if normalize:
        mean, std = latents.mean(), latents.std()
        frame_mean = latents.mean(dim=(1, 2, 3), keepdim=True)
        frame_std = latents.std(dim=(1, 2, 3), keepdim=True)
        tiny = torch.finfo(latents.dtype).tiny
        latents = (latents - frame_mean) / frame_std.clamp_min(tiny) * std + mean
    return latents * contrast
