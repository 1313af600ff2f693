"""Measures what videos of the synthetic world show: where each shape is, whether it is intact, and of which kind.

The first frame of a clip leaves two futures per lane open. A video is compared with the nearer one of each lane,
selected once for the whole video: a shape that changes to the other future is wrong from then on.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from . import world

#: Error of an absent shape, in picture widths: its position is unknown, so half of the largest possible error.
ABSENT_ERROR = (world.RIGHT - world.LEFT) / 2
#: Minimum strength of the color at a shape's center. In the mean of two futures, it is about one half.
LEAST_STRENGTH = 0.7


@dataclass(frozen=True)
class Sighting:
    """The shapes found in a video.

    Attributes:
        x: center of each lane's shape along x, in picture widths; NaN where it is absent [T, LANES].
        present: whether the lane contains one intact shape of its color, at full strength [T, LANES].
        strength: of the lane's color around the shape's center, 1 for a true shape [T, LANES].
        exchanged: whether half a shape or more has the other lane's color [T, LANES].
        mixed: whether a tenth of a shape or more has the other lane's color [T, LANES].
    """

    x: np.ndarray
    present: np.ndarray
    strength: np.ndarray
    exchanged: np.ndarray
    mixed: np.ndarray


@dataclass(frozen=True)
class Match:
    """The possible future of each lane that a video is nearest to.

    Attributes:
        path: its centers along x, in picture widths [T, LANES].
        error: distance from it; `ABSENT_ERROR` where there is no shape [T, LANES].
        heading: 1 to the right, -1 to the left [LANES].
    """

    path: np.ndarray
    error: np.ndarray
    heading: np.ndarray


def _hues(video: np.ndarray) -> np.ndarray:
    """How red and how blue each pixel is, 1 for a shape's own color [T, H, W, 2]."""
    red, green, blue = np.moveaxis(video.astype(np.float64), -1, 0)
    hues = np.stack([red - np.maximum(green, blue), blue - np.maximum(red, green)], axis=-1)
    shapes = np.array(list(world.COLORS.values()))
    full = np.array([shapes[0, 0] - shapes[0, 1:].max(), shapes[1, 2] - shapes[1, :2].max()])
    return np.clip(hues / full, 0, 1.2)


def sight(clip: world.Clip, video: np.ndarray) -> Sighting:
    """Find a clip's shapes in a video, by color.

    A shape counts as present if its lane contains 0.5 to 2 times the color of a true shape, at least two thirds of it
    within a shape's extent around the center, and the strength at the center is at least `LEAST_STRENGTH`.

    Args:
        video: 0..1 [T, H, W, 3].
    """
    size = video.shape[1]
    raw = _hues(video)
    hues = np.where(raw < 0.3, 0, raw)
    truth = _hues(world.draw(clip, clip.path(1), size))
    grid = (np.arange(size) + 0.5) / size
    height = size // world.LANES
    xs, present, strengths, others = [], [], [], []
    for lane in range(world.LANES):
        rows = slice(lane * height, (lane + 1) * height)
        color = clip.color[lane]
        columns = hues[:, rows, :, color].sum(1)
        mass, wanted = columns.sum(1), truth[..., color].sum()
        # The median column is robust against stray spots; the mean around it is more precise.
        total = np.maximum(mass, 1e-9)[:, None]
        middle = grid[(columns.cumsum(1) / total >= 0.5).argmax(1)]
        reach = np.abs(grid[None] - middle[:, None]) < world.RADIUS * 1.3
        inside = (columns * reach).sum(1)
        # Includes faint edges: without them, the center would jump when an edge crosses a pixel.
        near = raw[:, rows, :, color].sum(1) * reach
        center = (near * grid).sum(1) / np.maximum(near.sum(1), 1e-9)
        strength = _strength(raw[..., color], center, clip.y[lane], grid)
        whole = (mass > wanted / 2) & (mass < wanted * 2) & (inside > mass * 2 / 3)
        xs.append(np.where(mass > wanted / 4, center, np.nan))
        present.append(whole & (strength >= LEAST_STRENGTH))
        strengths.append(strength)
        others.append(hues[:, rows, :, 1 - color].sum((1, 2)) / truth[..., 1 - color].sum())
    x, whole, strength, other = (np.stack(values, axis=1) for values in (xs, present, strengths, others))
    return Sighting(x, whole, strength, other > 0.5, other > 0.1)


def _strength(hue: np.ndarray, x: np.ndarray, y: float, grid: np.ndarray) -> np.ndarray:
    """Mean of a hue [T, H, W] within half a radius of positions along x [T]: [T]."""
    distance = np.hypot(grid[None, None, :] - x[:, None, None], grid[None, :, None] - y)
    middle = distance < world.RADIUS / 2
    return (hue * middle).sum((1, 2)) / np.maximum(middle.sum((1, 2)), 1)


def match(sighting: Sighting, clip: world.Clip) -> Match:
    """The nearest possible future of each lane, by the mean distance over all frames."""
    futures = clip.futures(len(sighting.x))
    wrong = np.abs(sighting.x[None] - futures)
    wrong = np.where(np.isnan(wrong), ABSENT_ERROR, wrong)
    chosen = wrong.mean(1).argmin(0)  # [LANES]
    lanes = np.arange(world.LANES)
    heading = np.array(world.HEADINGS)[chosen]
    return Match(futures[chosen, :, lanes].T, wrong[chosen, :, lanes].T, heading)


def path_error(sighting: Sighting, clip: world.Clip) -> np.ndarray:
    """Distance from the nearest possible future, as `match` finds it [T, LANES]."""
    return match(sighting, clip).error


def kinds(clip: world.Clip, video: np.ndarray, sighting: Sighting) -> np.ndarray:
    """Classify each shape by the smallest squared difference from a drawing of each kind.

    Each kind is drawn in the lane's color at the position of the shape and half a pixel to either side, and compared
    over the whole lane.

    Args:
        video: 0..1 [T, H, W, 3].

    Returns:
        index into `world.KINDS`; -1 where the shape is absent [T, LANES].
    """
    size = video.shape[1]
    height = size // world.LANES
    seen = np.where(np.isnan(sighting.x), world.LEFT, sighting.x)
    apart = []
    for kind in range(len(world.KINDS)):
        alike = world.Clip(clip.x, clip.y, np.full(world.LANES, kind), clip.color, clip.motion_bucket, clip.heading)
        drawn = [world.draw(alike, seen + shift / size, size) for shift in (-0.5, 0, 0.5)]
        squares = np.stack([(video - picture) ** 2 for picture in drawn]).reshape(
            len(drawn), len(video), world.LANES, height, size, 3
        )
        apart.append(squares.mean((3, 4, 5)).min(0))
    return np.where(np.isnan(sighting.x), -1, np.stack(apart).argmin(0))


def binomial_interval(count: int, of: int) -> tuple[float, float]:
    """95% interval of a proportion, for `count` successes out of `of` (Wilson 1927)."""
    z = 1.96
    middle = (count + z * z / 2) / (of + z * z)
    half = z / (of + z * z) * np.sqrt(count * (of - count) / of + z * z / 4)
    return max(float(middle - half), 0.0), min(float(middle + half), 1.0)
