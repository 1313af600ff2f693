"""Measures what pictures of the synthetic world show: where each shape is, whether it is there, and what it is.

A clip's first frame leaves two futures a lane open. What a made clip shows is compared with the nearer one of each
lane, chosen once for the whole clip: a shape that changes its mind on the way is wrong from then on.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from . import world

#: What absence counts as, in picture widths: no place is measured, so half of what there is to be wrong by.
ABSENT_ERROR = (world.RIGHT - world.LEFT) / 2
#: Least strength of a shape's color at its middle. The mean of two futures shows either with half the strength.
LEAST_STRENGTH = 0.7


@dataclass(frozen=True)
class Sighting:
    """What the frames of a clip show.

    Attributes:
        x: center of each lane's shape along x, in picture widths; NaN where it is absent [T, LANES].
        present: the shape of the lane's color is there, in its lane, whole, in one piece and of full color
            [T, LANES].
        strength: of the lane's color around the shape's middle, 1 for its own [T, LANES].
        exchanged: the lane shows the other lane's color, by half a shape or more [T, LANES].
        mixed: the same, by a tenth of a shape or more [T, LANES].
    """

    x: np.ndarray
    present: np.ndarray
    strength: np.ndarray
    exchanged: np.ndarray
    mixed: np.ndarray


@dataclass(frozen=True)
class Match:
    """The possible future of each lane that a clip is nearest to.

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
    """Find a clip's shapes in pictures, by color.

    A shape counts as present when its lane holds half to twice the color that it should, at least two thirds of
    it within the shape's own reach of the center, and its middle is of at least `LEAST_STRENGTH`.

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
        # The median column is not drawn off by a stray spot as the mean is; the mean around it is finer.
        total = np.maximum(mass, 1e-9)[:, None]
        middle = grid[(columns.cumsum(1) / total >= 0.5).argmax(1)]
        reach = np.abs(grid[None] - middle[:, None]) < world.RADIUS * 1.3
        inside = (columns * reach).sum(1)
        # Faint edges count for the center: without them it would jump as they cross from pixel to pixel.
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
    """Mean of a hue [T, H, W] within half a radius of a place along x [T]: [T]."""
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
    """Which kind each shape looks like, by the least squared difference from a picture of it.

    Every kind is drawn in the lane's color at the place where the shape was seen and half a pixel to either side,
    and compared over the lane.

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
    """95 % interval of a share that came up `count` times `of` (Wilson 1927)."""
    z = 1.96
    middle = (count + z * z / 2) / (of + z * z)
    half = z / (of + z * z) * np.sqrt(count * (of - count) / of + z * z / 4)
    return max(float(middle - half), 0.0), min(float(middle + half), 1.0)
