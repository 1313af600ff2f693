"""A synthetic world whose truth is known: coloured shapes run back and forth on three lanes.

A clip is fixed by its first frame and its speed. Each lane holds one shape; disks set out to the right, squares to
the left, both turn round at the walls. All shapes of a clip share one speed, which is what the motion bucket says.
So every later frame of a clip follows from what a model is given, and any frame of a made clip can be measured
against the true one.

Every clip shows the same background and each colour once, at one size. A small SVD normalises its 32 channels in 32
groups, one channel each, so a picture's overall brightness and the share of a colour would be the one thing that it
cannot carry from layer to layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SIZE = 128  # pixels, width and height
LANES = 3
RADIUS = 0.105  # of a shape, in picture widths
LEFT, RIGHT = 0.13, 0.87  # where centres turn round
KINDS = ("disk", "square")
COLOURS = {"red": (0.92, 0.20, 0.18), "yellow": (0.95, 0.85, 0.20), "blue": (0.20, 0.35, 0.95)}
BACKGROUND = (0.28, 0.48)  # grey level at the top and at the bottom
SLOWEST, FASTEST = 0.006, 0.016  # picture widths per frame
BUCKETS = (40, 200)  # motion buckets of the slowest and the fastest clip


@dataclass(frozen=True)
class Clip:
    """What a clip shows.

    Attributes:
        x: centres at frame 0, in picture widths [LANES].
        y: centres, in picture heights [LANES]; they stay.
        kind: index into `KINDS` [LANES].
        colour: index into `COLOURS` [LANES]; every clip shows each colour once.
        speed: picture widths per frame.
    """

    x: np.ndarray
    y: np.ndarray
    kind: np.ndarray
    colour: np.ndarray
    speed: float

    @property
    def motion_bucket(self) -> int:
        share = (self.speed - SLOWEST) / (FASTEST - SLOWEST)
        return round(BUCKETS[0] + share * (BUCKETS[1] - BUCKETS[0]))

    def path(self, frames: int, start: int = 0) -> np.ndarray:
        """True centres along x, in picture widths [frames, LANES]."""
        span = RIGHT - LEFT
        heading = np.where(self.kind == 0, 1.0, -1.0)
        # A shape that turns round at walls is one that runs round a circle twice as long, seen from the side.
        start_phase = np.where(heading > 0, self.x - LEFT, 2 * span - (self.x - LEFT))
        steps = np.arange(start, start + frames)[:, None]
        phase = (start_phase[None] + self.speed * steps) % (2 * span)
        return LEFT + np.where(phase <= span, phase, 2 * span - phase)


def sample(seed: int) -> Clip:
    """The clip of a seed. Training uses seeds from 0 up, held-out clips those from `HELD_OUT` up."""
    random = np.random.default_rng(seed)
    kind = random.integers(len(KINDS), size=LANES)
    colour = random.permutation(len(COLOURS))[:LANES]
    lanes = (np.arange(LANES) + 0.5) / LANES
    bucket = random.integers(BUCKETS[0], BUCKETS[1] + 1)  # whole buckets: the speed is exactly what they say
    share = (bucket - BUCKETS[0]) / (BUCKETS[1] - BUCKETS[0])
    return Clip(
        x=random.uniform(LEFT, RIGHT, LANES),
        y=lanes + random.uniform(-0.03, 0.03, LANES),
        kind=kind,
        colour=colour,
        speed=SLOWEST + share * (FASTEST - SLOWEST),
    )


HELD_OUT = 10_000_000


def render(clip: Clip, frames: int, start: int = 0, size: int = SIZE) -> np.ndarray:
    """Pictures of a clip, edges smoothed over a pixel.

    Returns:
        float32 in 0..1 [frames, size, size, 3].
    """
    centres = clip.path(frames, start)
    grid = (np.arange(size, dtype=np.float32) + 0.5) / size
    top, bottom = BACKGROUND
    rows = (top + (bottom - top) * grid)[None, :, None, None]
    video = np.broadcast_to(rows, (frames, size, size, 3)).astype(np.float32)
    colours = np.array(list(COLOURS.values()), dtype=np.float32)
    for lane in range(LANES):
        dx = np.abs(grid[None, None, :] - centres[:, lane, None, None])
        dy = np.abs(grid[None, :, None] - np.float32(clip.y[lane]))
        distance = np.hypot(dx, dy) if clip.kind[lane] == 0 else np.maximum(dx, dy) * 1.13  # about the same area
        cover = np.clip((RADIUS - distance) * size + 0.5, 0, 1)[..., None].astype(np.float32)
        video += cover * (colours[clip.colour[lane]] - video)
    return video
