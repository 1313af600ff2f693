"""Figures of one video of the synthetic world: whole shapes, distance from a possible future, motion, color."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from . import measure, world

_STRIDE = 4
_LOST_STEP = 2.0  # a missing shape counts like a step in the wrong direction


@dataclass(frozen=True)
class Figures:
    """What was measured of a video.

    Attributes:
        values: the figures by name, see `benchmarks.method_measures.MEASURES`.
        sighting: where its shapes are.
        nearest: the possible future that it is nearest to.
    """

    values: dict[str, float]
    sighting: measure.Sighting
    nearest: measure.Match

    @property
    def to_the_right(self) -> int:
        """Number of shapes that set out to the right."""
        return int((self.nearest.heading > 0).sum())


def of_clip(clip: world.Clip, video: np.ndarray) -> Figures:
    """Measure a video.

    Args:
        clip: the true clip.
        video: the generated video [T, H, W, 3] in 0..1.
    """
    sighting = measure.sight(clip, video)
    nearest = measure.match(sighting, clip)
    errors = nearest.error
    steps, true_steps = np.diff(sighting.x, axis=0), np.diff(nearest.path, axis=0)
    wrong = np.abs(steps - true_steps) / clip.speed
    values = {
        "presence": float(sighting.present.mean()),
        "exchanged": float(sighting.exchanged.mean()),
        "mixed": float(sighting.mixed.mean()),
        "path_error": float(errors.mean()),
        "path_error_end": float(errors[-len(video) // 4 :].mean()),
        "jump": float(np.where(np.isnan(wrong), _LOST_STEP, wrong).mean()),
        "largest_step": _largest(sighting.x, 1) / clip.speed,
        "largest_stride": _largest(sighting.x, _STRIDE) / clip.speed,
        "background_drift": _background_drift(video),
    }
    return Figures(values, sighting, nearest)


def _largest(x: np.ndarray, frames: int) -> float:
    """95th percentile of the speed over a number of frames, per frame."""
    speeds = np.abs(x[frames:] - x[:-frames]) / frames
    speeds = speeds[~np.isnan(speeds)]
    return float(np.percentile(speeds, 95)) if speeds.size else float("nan")


def _background_drift(video: np.ndarray) -> float:
    gray = (video.max(-1) - video.min(-1) < 0.1)[..., None]
    difference = (video - world.background(video.shape[1])) * gray
    offset = difference.sum((1, 2)) / np.maximum(gray.sum((1, 2)), 1)  # [T, 3]
    return float(np.abs(offset - offset[0]).mean())
