"""Measures what pictures of the synthetic world show: where each shape is, and whether it is there."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from . import world

#: What absence counts as, in picture widths: no place is measured, so half of what there is to be wrong by.
ABSENT_ERROR = (world.RIGHT - world.LEFT) / 2


@dataclass(frozen=True)
class Sighting:
    """What the frames of a clip show.

    Attributes:
        x: centre of each lane's shape along x, in picture widths; NaN where it is absent [T, LANES].
        present: the shape of the lane's colour is there, in its lane, whole and in one piece [T, LANES].
    """

    x: np.ndarray
    present: np.ndarray


def _hues(video: np.ndarray) -> np.ndarray:
    """How red and how blue each pixel is, 1 for a shape's own colour [T, H, W, 2]."""
    red, green, blue = np.moveaxis(video.astype(np.float64), -1, 0)
    hues = np.stack([red - np.maximum(green, blue), blue - np.maximum(red, green)], axis=-1)
    shapes = np.array(list(world.COLOURS.values()))
    full = np.array([shapes[0, 0] - shapes[0, 1:].max(), shapes[1, 2] - shapes[1, :2].max()])
    return np.clip(hues / full, 0, 1.2)


def sight(clip: world.Clip, video: np.ndarray) -> Sighting:
    """Find a clip's shapes in pictures, by colour.

    A shape counts as present when its lane holds half to twice the colour that it should, at least two thirds of
    it within the shape's own reach of the centre.

    Args:
        video: 0..1 [T, H, W, 3].
    """
    size = video.shape[1]
    hues = _hues(video)
    hues[hues < 0.3] = 0
    truth = _hues(world.draw(clip, clip.path(1), size))
    grid = (np.arange(size) + 0.5) / size
    height = size // world.LANES
    xs, present = [], []
    for lane in range(world.LANES):
        rows = slice(lane * height, (lane + 1) * height)
        colour = clip.colour[lane]
        columns = hues[:, rows, :, colour].sum(1)
        mass, wanted = columns.sum(1), truth[..., colour].sum()
        # The median column is not drawn off by a stray spot as the mean is; the mean around it is finer.
        total = np.maximum(mass, 1e-9)[:, None]
        middle = grid[(columns.cumsum(1) / total >= 0.5).argmax(1)]
        near = columns * (np.abs(grid[None] - middle[:, None]) < world.RADIUS * 1.3)
        inside = near.sum(1)
        centre = (near * grid).sum(1) / np.maximum(inside, 1e-9)
        here = (mass > wanted / 2) & (mass < wanted * 2) & (inside > mass * 2 / 3)
        xs.append(np.where(mass > wanted / 4, centre, np.nan))
        present.append(here)
    return Sighting(np.stack(xs, axis=1), np.stack(present, axis=1))


def path_error(sighting: Sighting, clip: world.Clip) -> np.ndarray:
    """Distance from the true centre, in picture widths; `ABSENT_ERROR` where there is none [T, LANES]."""
    wrong = np.abs(sighting.x - clip.path(len(sighting.x)))
    return np.where(np.isnan(wrong), ABSENT_ERROR, wrong)
