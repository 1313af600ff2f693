"""Windows over a long clip, or tiles over a large picture: where they lie, how they blend, and noise that recurs."""

from __future__ import annotations

import math

import torch

from ..choices import Fuse


def spans(length: int, window: int, overlap: int, closed_loop: bool = False) -> list[list[int]]:
    """The windows that cover `length` frames, rows or columns, as the indices that each one holds.

    They are spread evenly, so that neighbours share `overlap` or a little more. In a closed loop the last ones run on
    at the beginning, and all are as short as their number allows.

    Raises:
        ValueError: the overlap leaves no step, or a loop has not twice as many frames as windows share.
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
    """Weight of each frame of a window where it is averaged with its neighbours, not normalised.

    *pyramid* rises to the window's middle (FreeNoise, Qiu et al. 2023), *overlap-linear* only fades where windows
    overlap, *flat* is one.

    Args:
        windows: of `spans`.
        number: which of them.

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
    follows = number > 0 or windows[-1][-1] < windows[-1][0]  # a closed loop's last window runs on into the first
    goes_on = number + 1 < len(windows) or windows[-1][-1] < windows[-1][0]
    if follows:
        shared = len(frames.intersection(windows[number - 1]))
        weights = torch.minimum(weights, (position + 1) / (shared + 1))
    if goes_on:
        shared = len(frames.intersection(windows[(number + 1) % len(windows)]))
        weights = torch.minimum(weights, (len(window) - position) / (shared + 1))
    return weights


def hold_weights(windows: list[list[int]], number: int) -> torch.Tensor:
    """How free each frame of a window is where windows before it are finished: 0 is held, 1 is to be made.

    Of the frames that it begins with (and, where a loop closes, ends with), those farthest from its own are held: a
    quarter. Over the rest the hold fades, so that what is there goes over into what is made.

    Returns:
        float32 [length of the window].
    """
    finished = {frame for window in windows[:number] for frame in window}
    own = [at for at, frame in enumerate(windows[number]) if frame not in finished]
    free = torch.ones(len(windows[number]))
    if not own:
        return torch.zeros_like(free)
    free[: own[0]] = _fade(own[0])
    free[own[-1] + 1 :] = _fade(len(free) - own[-1] - 1).flip(0)
    return free


def _fade(frames: int) -> torch.Tensor:
    held = min(max(frames // 4, 1), frames)
    fading = frames - held
    return torch.cat([torch.zeros(held), torch.arange(1, fading + 1) / (fading + 1)])


def recurring_noise(noise: torch.Tensor, window: int, overlap: int, seed: int) -> torch.Tensor:
    """Noise whose frames past the first window are those of the window before, shuffled (FreeNoise, Qiu et al. 2023).

    Windows then begin from the same noise in another order, and come out alike in what does not move.

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
