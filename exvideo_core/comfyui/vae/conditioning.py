"""Pictures in and out of the host's CLIP vision model and VAE."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import comfy.clip_vision
import comfy.model_management
import comfy.sd
import comfy.utils
import torch

from ...choices import Blend
from ...video import images as imaging
from ...video.frame_indices import free_share
from ..low_memory.host_buffers import buffers_for
from .chunked_decoder import decode_chunk

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


def decoded(
    vae: comfy.sd.VAE, latents: torch.Tensor, chunk_frames: int, overlap_frames: int, blend: Blend
) -> Iterator[torch.Tensor]:
    """Decode a clip in overlapped chunks of frames, blended where they overlap, and hand frames out as they are done.

    Reference: `SVDVAEDecoder.decode_video`, whose blend is *linear*. Holds one chunk and its overlap; shows progress,
    and can be cancelled between chunks and layers.

    Args:
        latents: [T, C, H, W].

    Yields:
        the next frames in order, [n, 8 H, 8 W, 3] in 0..1.
    """
    imaging.check_latents(latents)
    frames = latents.shape[0]
    tasks = list(imaging.chunks(frames, chunk_frames, overlap_frames))
    progress = comfy.utils.ProgressBar(len(tasks))
    waiting: torch.Tensor | None = None  # weighted pixels of the frames that the last chunk shares with the next
    shares = torch.zeros(0)
    buffers = buffers_for(vae.device)
    for index, (start, end) in enumerate(tasks):
        comfy.model_management.throw_exception_if_processing_interrupted()
        pixels = decode_chunk(vae, latents[start:end], buffers)
        weights = imaging.blend_weights(start, end, frames, overlap_frames, blend)
        pixels = pixels * weights.view(-1, 1, 1, 1).to(pixels)
        if waiting is not None:
            pixels[: len(waiting)] += waiting
            weights[: len(waiting)] += shares
        done = (tasks[index + 1][0] if index + 1 < len(tasks) else frames) - start
        yield pixels[:done].div_(weights[:done].view(-1, 1, 1, 1).to(pixels))
        waiting, shares = pixels[done:].clone(), weights[done:]
        progress.update(1)


def decode(
    vae: comfy.sd.VAE, latents: torch.Tensor, chunk_frames: int, overlap_frames: int, blend: Blend
) -> torch.Tensor:
    """The whole clip of `decoded`, [T, 8 H, 8 W, 3] in 0..1 on the host's device for results."""
    video: torch.Tensor | None = None
    done = 0
    for frames in decoded(vae, latents, chunk_frames, overlap_frames, blend):
        if video is None:
            device = comfy.model_management.intermediate_device()
            video = torch.empty((latents.shape[0], *frames.shape[1:]), dtype=frames.dtype, device=device)
        video[done : done + len(frames)] = frames
        done += len(frames)
    assert video is not None  # a clip has at least one frame, hence one chunk
    return video


def hold_frames(
    vae: comfy.sd.VAE, latent: dict[str, Any], images: torch.Tensor, frames: list[int], fade: int = 0
) -> dict[str, Any]:
    """A latent whose given frames are pictures that sampling keeps.

    Reference: the `mask_frames` of `SVDVideoPipeline.__call__`, which at every step puts the noised picture in a given
    frame's place. That is what the host does by a noise mask.

    Args:
        latent: the host's latent of a clip; frames that it holds already stay held.
        images: a picture for each frame [N, H, W, C] in 0..1, cut and scaled to the clip's size.
        fade: as in `keyframes.free_share`.

    Raises:
        ValueError: there are more or fewer pictures than frames, and not a single one for all.
    """
    if len(images) not in (1, len(frames)):
        raise ValueError(
            f"{len(images)} images are given for the {len(frames)} frames that frame_indices names. Give one for each, "
            "or a single one for all."
        )
    samples = latent["samples"].clone()
    count, _, height, width = samples.shape
    encoded = vae.encode(imaging.fit(images, width * 8, height * 8))
    samples[frames] = encoded.to(samples)
    mask = torch.ones(count, 1, height, width)
    if latent.get("noise_mask") is not None:
        mask = comfy.utils.reshape_mask(latent["noise_mask"], mask.shape).clone().to(mask)
    free = torch.tensor(free_share(frames, count, fade)).view(-1, 1, 1, 1)
    mask[frames] = torch.minimum(mask, free)[frames]
    return {**latent, "samples": samples, "noise_mask": mask}
