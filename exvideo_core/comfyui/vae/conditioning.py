"""SVD's conditioning, from the first frame of the video."""

from __future__ import annotations

from typing import Any

import comfy.clip_vision
import comfy.model_management
import comfy.sd
import torch

from ...video.images import add_pixel_noise, clip_vision_pixels, resize_and_crop

Conditioning = list[list[Any]]


def encode_conditioning(
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
    """Positive and negative conditioning of SVD, from the first image of a batch.

    Reference: `SVDVideoPipeline.encode_image_with_clip` and `encode_image_with_vae`. The negative conditioning is a
    zero embedding and a zero latent.

    Args:
        image: [B, H, W, C] in 0..1.
        noise_aug_strength: standard deviation of the noise added to the image, on its -1..1 scale.
    """
    first = resize_and_crop(image[:1], width, height)
    embedding = _image_embedding(clip_vision, first)[:, None]
    latent = vae.encode(add_pixel_noise(first, noise_aug_strength, seed))
    micro = {"motion_bucket_id": motion_bucket_id, "fps": fps, "augmentation_level": noise_aug_strength}
    return (
        [[embedding, {**micro, "concat_latent_image": latent}]],
        [[torch.zeros_like(embedding), {**micro, "concat_latent_image": torch.zeros_like(latent)}]],
    )


def embedding_of_frame(
    clip_vision: comfy.clip_vision.ClipVisionModel, vae: comfy.sd.VAE, latent: torch.Tensor
) -> torch.Tensor:
    """CLIP's embedding of a frame that was sampled, as the model is conditioned on it [1, 1, D].

    Args:
        latent: the frame, in the VAE's scale [1, 4, h, w].
    """
    return _image_embedding(clip_vision, vae.decode(latent))[:, None]


def _image_embedding(clip_vision: comfy.clip_vision.ClipVisionModel, image: torch.Tensor) -> torch.Tensor:
    """CLIP's image embedding [B, D]. Calls the model itself: ComfyUI's `encode_image` crops and rounds first."""
    comfy.model_management.load_model_gpu(clip_vision.patcher)
    pixels = clip_vision_pixels(image.to(clip_vision.load_device), clip_vision.image_size)
    output = clip_vision.model(pixel_values=pixels, intermediate_output=-2)
    return output[2].to(comfy.model_management.intermediate_device())
