"""Which frames of a clip a text names."""

from __future__ import annotations

import re
from collections import Counter

_PART = re.compile(r"(-?\d+)(?:\s*-\s*(-?\d+))?")


def frame_indices(text: str, frames: int) -> list[int]:
    """Frames named by a list like `0, 16-31, -1`: from 0, negative ones from the end, ranges with both ends.

    Args:
        frames: of the clip.

    Raises:
        ValueError: the text is no such list, or names a frame twice or outside of the clip.
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


def free_share(indices: list[int], frames: int, fade: int) -> list[float]:
    """How free each frame of a clip is: 0 is held, 1 is to be made.

    Args:
        indices: frames that are given.
        frames: of the clip.
        fade: last frames of a run of given ones over which the hold fades, where free ones follow. A run's first frame
            is always held.
    """
    free = [1.0] * frames
    given = set(indices)
    for start in given:
        if start - 1 in given:
            continue
        end = start
        while end in given:
            free[end] = 0.0
            end += 1
        fading = min(fade, end - start - 1) if end < frames else 0
        for step in range(fading):
            free[end - fading + step] = (step + 1) / (fading + 1)
    return free


def _frame(number: str, frames: int) -> int:
    frame = int(number)
    if not -frames <= frame < frames:
        raise ValueError(
            f"frame_indices names frame {frame}, but the clip's {frames} frames are 0 to {frames - 1} "
            f"(or -{frames} to -1, from the end)."
        )
    return frame % frames
