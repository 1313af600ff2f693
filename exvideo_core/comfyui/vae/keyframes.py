"""Frames of a latent that are fixed to given images."""

from __future__ import annotations

from typing import Any

import comfy.sd
import comfy.utils
import torch

from ...video.frame_indices import noise_mask_values
from ...video.images import resize_and_crop


def set_keyframes(
    vae: comfy.sd.VAE, latent: dict[str, Any], images: torch.Tensor, frames: list[int], fade: int = 0
) -> dict[str, Any]:
    """A latent in which the given frames are images that sampling keeps.

    Reference: the `mask_frames` of `SVDVideoPipeline.__call__`, which replaces these frames by the noised images at
    every step. ComfyUI's noise mask does the same.

    Args:
        latent: ComfyUI's latent of a video; frames that its noise mask already keeps stay kept.
        images: one per frame, or one for all [N, H, W, C] in 0..1, resized and cropped to the video's size.
        frames: indices of the keyframes.
        fade: as in `noise_mask_values`.

    Raises:
        ValueError: the number of images is neither 1 nor the number of frames.
    """
    if len(images) not in (1, len(frames)):
        raise ValueError(
            f"{len(images)} images are given for the {len(frames)} frames that frame_indices names. Give one for each, "
            "or a single one for all."
        )
    samples = latent["samples"].clone()
    count, _, height, width = samples.shape
    encoded = vae.encode(resize_and_crop(images, width * 8, height * 8))
    samples[frames] = encoded.to(samples)
    mask = torch.ones(count, 1, height, width)
    if latent.get("noise_mask") is not None:
        mask = comfy.utils.reshape_mask(latent["noise_mask"], mask.shape).clone().to(mask)
    values = torch.tensor(noise_mask_values(frames, count, fade)).view(-1, 1, 1, 1)
    mask[frames] = torch.minimum(mask, values)[frames]
    return {**latent, "samples": samples, "noise_mask": mask}
