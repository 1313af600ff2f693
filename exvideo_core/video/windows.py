"""Overlapping windows over a long video, or tiles over a large image: placement, blend weights and initial noise."""

from __future__ import annotations

import math

import torch

from ..choices import Fuse


def split_windows(length: int, window: int, overlap: int, closed_loop: bool = False) -> list[list[int]]:
    """The windows that cover `length` frames, rows or columns, each as the list of its indices.

    They are spaced evenly, so that neighbors share `overlap` or slightly more. In a closed loop the last windows wrap
    around to the beginning, and all are as short as their number allows.

    Raises:
        ValueError: the overlap is not smaller than the window, or a loop is shorter than two overlaps.
    """
    if not 0 <= overlap < window:
        raise ValueError(f"The overlap ({overlap}) has to be smaller than the window ({window}).")
    if closed_loop:
        if length < 2 * max(overlap, 1):
            raise ValueError(
                f"A closed loop of {length} frames is too short for an overlap of {overlap}. Lower overlap_frames to "
                f"{length // 2} or less."
            )
        count = max(2, math.ceil(length / (window - overlap)))
        size = min(math.ceil(length / count) + overlap, length)
        return [[(i * length // count + k) % length for k in range(size)] for i in range(count)]
    if length <= window:
        return [list(range(length))]
    count = math.ceil((length - overlap) / (window - overlap))
    starts = [round(i * (length - window) / (count - 1)) for i in range(count)]
    return [list(range(start, start + window)) for start in starts]


def fuse_weights(windows: list[list[int]], number: int, fuse: Fuse) -> torch.Tensor:
    """Weight of each frame of a window when windows are averaged, not normalized.

    *pyramid* rises to the window's middle (FreeNoise, Qiu et al. 2023), *overlap-linear* fades only where windows
    overlap, *flat* is one everywhere.

    Args:
        windows: of `split_windows`.
        number: index of the window.

    Returns:
        float32 [length of the window].
    """
    window = windows[number]
    position = torch.arange(len(window), dtype=torch.float32)
    if fuse == "flat":
        return torch.ones(len(window))
    if fuse == "pyramid":
        return torch.minimum(position + 1, len(window) - position)
    weights = torch.ones(len(window))
    frames = set(window)
    closed_loop = windows[-1][-1] < windows[-1][0]  # the last window wraps around to the first
    if number > 0 or closed_loop:
        shared = len(frames.intersection(windows[number - 1]))
        weights = torch.minimum(weights, (position + 1) / (shared + 1))
    if number + 1 < len(windows) or closed_loop:
        shared = len(frames.intersection(windows[(number + 1) % len(windows)]))
        weights = torch.minimum(weights, (len(window) - position) / (shared + 1))
    return weights


def continuation_mask(windows: list[list[int]], number: int) -> torch.Tensor:
    """Noise mask of a window that continues finished ones: 0 keeps a frame, 1 denoises it.

    Of the finished frames at its start (and, where a loop closes, at its end), the outermost quarter is kept; over the
    rest the mask rises, so that finished frames blend into new ones.

    Returns:
        float32 [length of the window].
    """
    finished = {frame for window in windows[:number] for frame in window}
    new = [at for at, frame in enumerate(windows[number]) if frame not in finished]
    mask = torch.ones(len(windows[number]))
    if not new:
        return torch.zeros_like(mask)
    mask[: new[0]] = _rise(new[0])
    mask[new[-1] + 1 :] = _rise(len(mask) - new[-1] - 1).flip(0)
    return mask


def _rise(frames: int) -> torch.Tensor:
    kept = min(max(frames // 4, 1), frames)
    rising = frames - kept
    return torch.cat([torch.zeros(kept), torch.arange(1, rising + 1) / (rising + 1)])


def freenoise(noise: torch.Tensor, window: int, overlap: int, seed: int) -> torch.Tensor:
    """Noise in which each window reuses the previous window's frames, shuffled (FreeNoise, Qiu et al. 2023).

    Windows that start from the same noise in another order agree in what does not move.

    Args:
        noise: [T, C, H, W].
    """
    generator = torch.Generator().manual_seed(seed)
    order = list(range(min(window, len(noise))))
    step = window - overlap
    while len(order) < len(noise):
        group = order[len(order) - window : len(order) - window + step]
        order += [group[i] for i in torch.randperm(len(group), generator=generator).tolist()]
    return noise[order[: len(noise)]]
