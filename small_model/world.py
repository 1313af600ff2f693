"""A synthetic world whose truth is known: two coloured shapes run back and forth, each in its own lane.

A clip is fixed by its first frame and its speed. Disks set out to the right, squares to the left, both turn round at
the walls. The shapes of a clip share one of three speeds, which is what the motion bucket says. So every later frame
of a clip follows from what a model is given, and any frame of a made clip can be measured against the true one.

A shape that has turned round looks as it did before: one frame does not tell where it is heading, only the clip's
first frame does. A model that goes on from the last frame of what it made can therefore not stay on the true path.

Every clip shows the same background and each colour once, at one size. A small SVD normalises its 32 channels in 32
groups, one channel each, so a picture's overall brightness and the share of a colour would be the one thing that it
cannot carry from layer to layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

SIZE = 64  # pixels, width and height
LANES = 2
RADIUS = 0.14  # of a shape, in picture widths
LEFT, RIGHT = 0.18, 0.82  # where centres turn round
KINDS = ("disk", "square")
COLOURS = {"red": (0.92, 0.20, 0.18), "blue": (0.20, 0.35, 0.95)}
BACKGROUND = (0.55, 0.75)  # grey level at the top and at the bottom
SPEEDS = {40: 0.006, 100: 0.010, 160: 0.014}  # motion bucket -> picture widths per frame
HELD_OUT = 10_000_000  # seeds from here on are never trained on


@dataclass(frozen=True)
class Clip:
    """What a clip shows.

    Attributes:
        x: centres at frame 0, in picture widths [LANES].
        y: centres, in picture heights [LANES]; they stay.
        kind: index into `KINDS` [LANES].
        colour: index into `COLOURS` [LANES]; every clip shows each colour once.
        motion_bucket: key of `SPEEDS`.
    """

    x: np.ndarray
    y: np.ndarray
    kind: np.ndarray
    colour: np.ndarray
    motion_bucket: int

    @property
    def speed(self) -> float:
        """Picture widths per frame."""
        return SPEEDS[self.motion_bucket]

    def path(self, frames: int) -> np.ndarray:
        """True centres along x, in picture widths [frames, LANES]."""
        span = RIGHT - LEFT
        # A shape that turns round at walls is one that runs round a circle twice as long, seen from the side.
        start = np.where(self.kind == 0, self.x - LEFT, LEFT - self.x)
        phase = (start[None] + self.speed * np.arange(frames)[:, None]) % (2 * span)
        return LEFT + np.where(phase <= span, phase, 2 * span - phase)

    def sets_out_at(self, frame: int, frames: int) -> bool:
        """Whether its shapes move, for some frames from this one on, as those of a clip that begins there.

        A model takes a clip's first frame for where its shapes are heading: only such a clip can be gone on from.
        """
        ways = np.sign(np.diff(self.path(frame + frames), axis=0)[frame:])
        return bool((ways == np.where(self.kind == 0, 1, -1)).all())


def sample(seed: int) -> Clip:
    """The clip of a seed. Training uses seeds from 0 up, held-out clips those from `HELD_OUT` up."""
    random = np.random.default_rng(seed)
    lanes = (np.arange(LANES) + 0.5) / LANES
    return Clip(
        x=random.uniform(LEFT, RIGHT, LANES),
        y=lanes + random.uniform(-0.04, 0.04, LANES),
        kind=random.integers(len(KINDS), size=LANES),
        colour=random.permutation(len(COLOURS)),
        motion_bucket=int(random.choice(list(SPEEDS))),
    )


def render(clip: Clip, frames: int, size: int = SIZE) -> np.ndarray:
    """Pictures of a clip, edges smoothed over a pixel.

    Returns:
        float32 in 0..1 [frames, size, size, 3].
    """
    return draw(clip, clip.path(frames), size)


def draw(clip: Clip, centres: np.ndarray, size: int = SIZE) -> np.ndarray:
    """Pictures of a clip's shapes at given places along x.

    Args:
        centres: in picture widths [frames, LANES].

    Returns:
        float32 in 0..1 [frames, size, size, 3].
    """
    grid = (np.arange(size, dtype=np.float32) + 0.5) / size
    video = np.broadcast_to(background(size), (len(centres), size, size, 3)).astype(np.float32)
    colours = np.array(list(COLOURS.values()), dtype=np.float32)
    for lane in range(LANES):
        dx = np.abs(grid[None, None, :] - centres[:, lane, None, None])
        dy = np.abs(grid[None, :, None] - np.float32(clip.y[lane]))
        distance = np.hypot(dx, dy) if clip.kind[lane] == 0 else np.maximum(dx, dy) * 1.13  # about the same area
        cover = np.clip((RADIUS - distance) * size + 0.5, 0, 1)[..., None].astype(np.float32)
        video += cover * (colours[clip.colour[lane]] - video)
    return video


def as_bytes(video: np.ndarray) -> torch.Tensor:
    """0..1 -> uint8, as video files hold it and the post-tuning's encoder reads it."""
    import torch

    return torch.from_numpy((video * 255).round().astype(np.uint8))


def background(size: int = SIZE) -> np.ndarray:
    """The picture without shapes, float32 in 0..1 [size, size, 3]."""
    rows = np.linspace(*BACKGROUND, size, dtype=np.float32)
    return np.broadcast_to(rows[:, None, None], (size, size, 3))
