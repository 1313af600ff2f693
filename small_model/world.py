"""A synthetic world with open futures: two colored shapes move back and forth, each in its own lane.

The first frame and the motion bucket of a clip do not determine what follows. Each shape starts to the left or to the
right at random, independently of its kind, its color and the other lane, and turns around at the walls. The shapes of
a clip share one of three speeds, which the motion bucket gives. So every clip has four possible futures, two per lane.
All of them can be computed, and a generated video is compared with the nearest one.

The mean of the futures is not a possible video: it shows every shape at half strength in two places. This is what a
model predicts in one step from pure noise, so measures can tell it from a model that has decided on a future.

Every clip has the same background and contains each color once; all shapes have the same size.
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
SQUARE_SCALE = 1.13  # a square of about the disk's area reaches this much less far
LEFT, RIGHT = 0.18, 0.82  # where centers turn around
KINDS = ("disk", "square")
HEADINGS = (-1, 1)  # to the left, to the right
COLORS = {"red": (0.92, 0.20, 0.18), "blue": (0.20, 0.35, 0.95)}
BACKGROUND = (0.55, 0.75)  # gray level at the top and at the bottom
SPEEDS = {40: 0.006, 100: 0.010, 160: 0.014}  # motion bucket -> picture widths per frame
HELD_OUT = 10_000_000  # seeds from here on are never trained on


@dataclass(frozen=True)
class Clip:
    """A clip of the world.

    Attributes:
        x: centers at frame 0, in picture widths [LANES].
        y: centers, in picture heights [LANES]; constant.
        kind: index into `KINDS` [LANES].
        color: index into `COLORS` [LANES]; every clip shows each color once.
        motion_bucket: key of `SPEEDS`.
        heading: direction in which each shape starts, 1 to the right or -1 to the left [LANES].
    """

    x: np.ndarray
    y: np.ndarray
    kind: np.ndarray
    color: np.ndarray
    motion_bucket: int
    heading: np.ndarray

    @property
    def speed(self) -> float:
        """Picture widths per frame."""
        return SPEEDS[self.motion_bucket]

    def path(self, frames: int) -> np.ndarray:
        """True centers along x, in picture widths [frames, LANES]."""
        return self._path(frames, self.heading)

    def futures(self, frames: int) -> np.ndarray:
        """The possible paths, by `HEADINGS` [2, frames, LANES]. The lanes are independent of each other."""
        return np.stack([self._path(frames, np.full(LANES, heading)) for heading in HEADINGS])

    def _path(self, frames: int, heading: np.ndarray) -> np.ndarray:
        span = RIGHT - LEFT
        # Moving back and forth between walls is moving around a circle of twice the length, seen from the side.
        start = np.where(heading > 0, self.x - LEFT, LEFT - self.x)
        phase = (start[None] + self.speed * np.arange(frames)[:, None]) % (2 * span)
        return LEFT + np.where(phase <= span, phase, 2 * span - phase)


def sample(seed: int) -> Clip:
    """The clip of a seed. Training uses seeds from 0 up, held-out clips those from `HELD_OUT` up."""
    random = np.random.default_rng(seed)
    lanes = (np.arange(LANES) + 0.5) / LANES
    return Clip(
        x=random.uniform(LEFT, RIGHT, LANES),
        y=lanes + random.uniform(-0.04, 0.04, LANES),
        kind=random.integers(len(KINDS), size=LANES),
        color=random.permutation(len(COLORS)),
        motion_bucket=int(random.choice(list(SPEEDS))),
        heading=random.choice(HEADINGS, LANES),
    )


def render(clip: Clip, frames: int, size: int = SIZE) -> np.ndarray:
    """Draw the frames of a clip, with edges that are one pixel wide.

    Returns:
        float32 in 0..1 [frames, size, size, 3].
    """
    return draw(clip, clip.path(frames), size)


def draw(clip: Clip, centers: np.ndarray, size: int = SIZE) -> np.ndarray:
    """Draw a clip's shapes at given positions.

    Args:
        centers: along x, in picture widths [frames, LANES].

    Returns:
        float32 in 0..1 [frames, size, size, 3].
    """
    grid = (np.arange(size, dtype=np.float32) + 0.5) / size
    video = np.broadcast_to(background(size), (len(centers), size, size, 3)).astype(np.float32)
    colors = np.array(list(COLORS.values()), dtype=np.float32)
    for lane in range(LANES):
        dx = np.abs(grid[None, None, :] - centers[:, lane, None, None])
        dy = np.abs(grid[None, :, None] - np.float32(clip.y[lane]))
        distance = np.hypot(dx, dy) if clip.kind[lane] == 0 else np.maximum(dx, dy) * SQUARE_SCALE
        cover = np.clip((RADIUS - distance) * size + 0.5, 0, 1)[..., None].astype(np.float32)
        video += cover * (colors[clip.color[lane]] - video)
    return video


def as_bytes(video: np.ndarray) -> torch.Tensor:
    """Convert 0..1 to uint8, as in video files and as post-tuning's encoder expects it."""
    import torch

    return torch.from_numpy((video * 255).round().astype(np.uint8))


def background(size: int = SIZE) -> np.ndarray:
    """The background, float32 in 0..1 [size, size, 3]."""
    rows = np.linspace(*BACKGROUND, size, dtype=np.float32)
    return np.broadcast_to(rows[:, None, None], (size, size, 3))
