"""Parses lists of frames, and builds the noise mask of keyframes."""

from __future__ import annotations

import re
from collections import Counter

_PART = re.compile(r"(-?\d+)(?:\s*-\s*(-?\d+))?")


def frame_indices(text: str, frames: int) -> list[int]:
    """Parse a list like `0, 16-31, -1`: frames count from 0, negative ones from the end; ranges include both ends.

    Args:
        text: the list.
        frames: number of frames of the video.

    Returns:
        Indices from 0 to frames - 1, in the order of the list.

    Raises:
        ValueError: the text is not such a list, or names a frame twice or outside of the video.
    """
    found: list[int] = []
    for part in text.split(","):
        match = _PART.fullmatch(part.strip())
        if match is None:
            raise ValueError(
                f"frame_indices has '{part.strip()}', which is neither a frame nor a range. Write frames from 0 up, "
                "separated by commas, such as '0, 16-31, -1'."
            )
        first, last = (_frame(number, frames) for number in (match[1], match[2] or match[1]))
        if last < first:
            raise ValueError(f"The range '{part.strip()}' in frame_indices runs backwards.")
        found += range(first, last + 1)
    if len(set(found)) < len(found):
        twice = min(frame for frame, count in Counter(found).items() if count > 1)
        raise ValueError(f"frame_indices names frame {twice} more than once.")
    return found


def noise_mask_values(indices: list[int], frames: int, fade: int) -> list[float]:
    """Noise mask of each frame of a video: 0 keeps it, 1 denoises it.

    Args:
        indices: keyframes.
        frames: number of frames of the video.
        fade: where free frames follow a run of keyframes, the mask rises over this many of its last frames. The first
            frame of a run is always kept.
    """
    mask = [1.0] * frames
    keyframes = set(indices)
    for start in keyframes:
        if start - 1 in keyframes:
            continue
        end = start
        while end in keyframes:
            mask[end] = 0.0
            end += 1
        fading = min(fade, end - start - 1) if end < frames else 0
        for step in range(fading):
            mask[end - fading + step] = (step + 1) / (fading + 1)
    return mask


def _frame(number: str, frames: int) -> int:
    frame = int(number)
    if not -frames <= frame < frames:
        raise ValueError(
            f"frame_indices names frame {frame}, but the video's {frames} frames are 0 to {frames - 1} "
            f"(or -{frames} to -1, from the end)."
        )
    return frame % frames
