"""Pictures in and out of the host's CLIP vision model and VAE."""

from __future__ import annotations

from typing import Any

import comfy.clip_vision
import comfy.model_management
import comfy.sd
import comfy.utils
import torch

from ... import imaging

Conditioning = list[list[Any]]


def condition(
    clip_vision: comfy.clip_vision.ClipVisionModel,
    vae: comfy.sd.VAE,
    image: torch.Tensor,
    *,
    width: int,
    height: int,
    fps: int,
    motion_bucket_id: int,
    noise_aug_strength: float,
    seed: int,
) -> tuple[Conditioning, Conditioning]:
    """Positive and negative conditioning of SVD, from the first picture of a batch.

    Reference: `SVDVideoPipeline.encode_image_with_clip` and `encode_image_with_vae`. The negative is a zero embedding
    and a zero latent.

    Args:
        image: [B, H, W, C] in 0..1.
        noise_aug_strength: deviation of the noise on the picture, on its -1..1 scale.
    """
    picture = imaging.fit(image[:1], width, height)
    embedding = _embed(clip_vision, picture)[:, None]
    latent = vae.encode(imaging.add_pixel_noise(picture, noise_aug_strength, seed))
    micro = {"motion_bucket_id": motion_bucket_id, "fps": fps, "augmentation_level": noise_aug_strength}
    return (
        [[embedding, {**micro, "concat_latent_image": latent}]],
        [[torch.zeros_like(embedding), {**micro, "concat_latent_image": torch.zeros_like(latent)}]],
    )


def _embed(clip_vision: comfy.clip_vision.ClipVisionModel, picture: torch.Tensor) -> torch.Tensor:
    """Image embedding [B, D]. The model is called itself: the host's `encode_image` crops and rounds first."""
    comfy.model_management.load_model_gpu(clip_vision.patcher)
    pixels = imaging.clip_pixels(picture.to(clip_vision.load_device), clip_vision.image_size)
    output = clip_vision.model(pixel_values=pixels, intermediate_output=-2)
    return output[2].to(comfy.model_management.intermediate_device())


def decode(vae: comfy.sd.VAE, latents: torch.Tensor, chunk_frames: int, overlap_frames: int) -> torch.Tensor:
    """Decode a clip in overlapped chunks of frames, blended where they overlap.

    Reference: `SVDVAEDecoder.decode_video`. Shows progress, and can be cancelled between chunks.

    Args:
        latents: [T, C, H, W].

    Returns:
        [T, 8 H, 8 W, 3] in 0..1.
    """
    frames = latents.shape[0]
    tasks = list(imaging.chunks(frames, chunk_frames, overlap_frames))
    progress = comfy.utils.ProgressBar(len(tasks))
    video: torch.Tensor | None = None
    total = torch.zeros(frames, 1, 1, 1)
    for start, end in tasks:
        comfy.model_management.throw_exception_if_processing_interrupted()
        pixels = vae.decode(latents[start:end])
        if video is None:
            video = torch.zeros((frames, *pixels.shape[1:]), dtype=pixels.dtype)
        weights = imaging.blend_weights(start, end, frames).view(-1, 1, 1, 1)
        video[start:end] += pixels.cpu() * weights.to(pixels.dtype)
        total[start:end] += weights
        progress.update(1)
    assert video is not None  # a clip has at least one frame, hence one chunk
    return video.div_(total.to(video.dtype)).to(comfy.model_management.intermediate_device())
