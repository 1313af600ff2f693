"""Decodes a video in overlapping segments of frames."""

from __future__ import annotations

from collections.abc import Iterator

import comfy.model_management
import comfy.sd
import comfy.utils
import torch

from ...choices import Blend
from ...video.blending import segment_weights, split_segments
from ...video.latents import check_latents
from ..low_memory.host_buffers import host_buffers
from .chunked_decoder import decode_segment


def decode(
    vae: comfy.sd.VAE, latents: torch.Tensor, segment_frames: int, overlap_frames: int, blend: Blend
) -> torch.Tensor:
    """Decode a whole video: `decode_segments`, collected.

    Returns:
        [T, 8 H, 8 W, 3] in 0..1, on ComfyUI's device for results.
    """
    video: torch.Tensor | None = None
    done = 0
    for frames in decode_segments(vae, latents, segment_frames, overlap_frames, blend):
        if video is None:
            device = comfy.model_management.intermediate_device()
            video = torch.empty((latents.shape[0], *frames.shape[1:]), dtype=frames.dtype, device=device)
        video[done : done + len(frames)] = frames
        done += len(frames)
    assert video is not None  # a video has at least one frame, hence one segment
    return video


def decode_segments(
    vae: comfy.sd.VAE, latents: torch.Tensor, segment_frames: int, overlap_frames: int, blend: Blend
) -> Iterator[torch.Tensor]:
    """Decode a video in overlapping segments, blended where they overlap, and yield frames as soon as they are done.

    Reference: `SVDVAEDecoder.decode_video`, whose blend is *linear*. Keeps one segment and its overlap in memory; shows
    progress, and can be cancelled between segments and layers.

    Args:
        latents: [T, C, H, W].

    Yields:
        the next frames in order, [n, 8 H, 8 W, 3] in 0..1.
    """
    check_latents(latents)
    frames = latents.shape[0]
    segments = list(split_segments(frames, segment_frames, overlap_frames))
    progress = comfy.utils.ProgressBar(len(segments))
    overlap: torch.Tensor | None = None  # weighted pixels of the frames that the last segment shares with the next
    overlap_weights = torch.zeros(0)
    buffers = host_buffers(vae.device)
    for index, (start, end) in enumerate(segments):
        comfy.model_management.throw_exception_if_processing_interrupted()
        pixels = decode_segment(vae, latents[start:end], buffers)
        weights = segment_weights(start, end, frames, overlap_frames, blend)
        pixels = pixels * weights.view(-1, 1, 1, 1).to(pixels)
        if overlap is not None:
            pixels[: len(overlap)] += overlap
            weights[: len(overlap)] += overlap_weights
        done = (segments[index + 1][0] if index + 1 < len(segments) else frames) - start
        yield pixels[:done].div_(weights[:done].view(-1, 1, 1, 1).to(pixels))
        overlap, overlap_weights = pixels[done:].clone(), weights[done:]
        progress.update(1)
