"""Overlapping segments of frames for decoding, and their blend weights."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from ..choices import Blend


def split_segments(frames: int, size: int, overlap: int) -> Iterator[tuple[int, int]]:
    """Split `frames` into overlapping segments; the last one may be shorter.

    Args:
        frames: number of frames.
        size: frames per segment.
        overlap: frames that neighboring segments share.

    Yields:
        (start, end) of each segment.

    Raises:
        ValueError: the overlap is not smaller than a segment.
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


def segment_weights(start: int, end: int, frames: int, overlap: int, blend: Blend) -> torch.Tensor:
    """Blend weight of each frame of a segment, not normalized; the video's ends are not faded.

    *linear* is the reference's: a ramp from both ends of the segment, regardless of the overlap. *smooth* drops the
    outer third of the overlap, whose frames were decoded with few neighbors in time, and crossfades the rest with
    squared sines, which sum to one.

    Args:
        start, end: the segment, as yielded by `split_segments`.
        frames: number of frames of the video.
        overlap: frames that neighboring segments share.
        blend: *linear* or *smooth*.

    Returns:
        float32 [end - start].
    """
    length = end - start
    position = torch.arange(length, dtype=torch.float32)
    if blend == "linear":
        flat, rising = torch.full((length,), float(length)), position + 1
    else:
        dropped = overlap // 3
        fading = max(overlap - 2 * dropped, 1)
        flat = torch.ones(length)
        rising = torch.sin(((position + 0.5 - dropped) / fading).clamp(0, 1) * (math.pi / 2)).square()
    return torch.minimum(rising if start > 0 else flat, rising.flip(0) if end < frames else flat)
