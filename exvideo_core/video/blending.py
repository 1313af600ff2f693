"""Overlapping segments of frames for decoding, and how they blend."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from ..choices import Blend


def split_segments(frames: int, size: int, overlap: int) -> Iterator[tuple[int, int]]:
    """Start and end of overlapping segments that cover `frames`; the last one may be shorter.

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
    """Weight of each frame of a segment where it blends with its neighbors; the video's ends are not faded.

    *linear* is the reference's: a ramp up from the segment's start and down to its end, whatever the overlap.
    *smooth* drops the outer third of the overlap, where frames have few neighbors in time to be decoded with, and
    crossfades the rest by squared sines, which sum to one.

    Returns:
        [end - start] in float32.
    """
    length = end - start
    position = torch.arange(length, dtype=torch.float32)
    if blend == "linear":
        most, rising = torch.full((length,), float(length)), position + 1
    else:
        dropped = overlap // 3
        fading = max(overlap - 2 * dropped, 1)
        most = torch.ones(length)
        rising = torch.sin(((position + 0.5 - dropped) / fading).clamp(0, 1) * (math.pi / 2)).square()
    return torch.minimum(rising if start > 0 else most, rising.flip(0) if end < frames else most)
