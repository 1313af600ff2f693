"""What is measured of made clips, and how sure the means are."""

from __future__ import annotations

import numpy as np

from small_model import measure, world

#: name -> (what it is, its value for a perfect clip)
MEASURES = {
    "presence": ("share of frames in which a lane's shape is there, whole and of its colour", 1.0),
    "path_error": ("distance from the true path, in picture widths, over all frames", 0.0),
    "path_error_end": ("the same over the last quarter of the frames", 0.0),
    "jump": ("how far frame-to-frame steps are from the true ones, in units of the true speed", 0.0),
    "largest_step": ("95th percentile of the size of steps, in units of the true speed", 1.0),
    "largest_stride": ("the same for the way of 4 frames, to which the pictures' wobble adds a fourth as much", 1.0),
    "background_drift": ("change of the background's colour since the first frame, 0..1", 0.0),
    "frechet": ("Fréchet distance of clip features from those of true clips", 0.0),
}
_STRIDE = 4
_LOST_STEP = 2.0  # a step from or to an absent shape counts like one in the wrong direction


def of_clip(clip: world.Clip, video: np.ndarray) -> tuple[dict[str, float], np.ndarray]:
    """Measures of one clip (all but the Fréchet distance), and its path error by frame [T].

    Args:
        video: 0..1 [T, H, W, 3].
    """
    sighting = measure.sight(clip, video)
    errors = measure.path_error(sighting, clip)
    steps, true_steps = np.diff(sighting.x, axis=0), np.diff(clip.path(len(video)), axis=0)
    wrong = np.abs(steps - true_steps) / clip.speed
    return {
        "presence": float(sighting.present.mean()),
        "path_error": float(errors.mean()),
        "path_error_end": float(errors[-len(video) // 4 :].mean()),
        "jump": float(np.where(np.isnan(wrong), _LOST_STEP, wrong).mean()),
        "largest_step": _largest(sighting.x, 1) / clip.speed,
        "largest_stride": _largest(sighting.x, _STRIDE) / clip.speed,
        "background_drift": _background_drift(video),
    }, errors.mean(1)


def _largest(x: np.ndarray, frames: int) -> float:
    """95th percentile of the size of ways over some frames, per frame."""
    ways = np.abs(x[frames:] - x[:-frames]) / frames
    ways = ways[~np.isnan(ways)]
    return float(np.percentile(ways, 95)) if ways.size else float("nan")


def _background_drift(video: np.ndarray) -> float:
    colourless = (video.max(-1) - video.min(-1) < 0.1)[..., None]
    difference = (video - world.background(video.shape[1])) * colourless
    offset = difference.sum((1, 2)) / np.maximum(colourless.sum((1, 2)), 1)  # [T, 3]
    return float(np.abs(offset - offset[0]).mean())


class Features:
    """Principal components of true clips, small and grey-free: 24 numbers a clip.

    A clip is read every 4th frame, as redness minus blueness averaged over cells of 4x8 pixels. The components are
    those of clips that no row is compared with.
    """

    def __init__(self, fitted_on: range, count: int = 24) -> None:
        flat = np.stack([self._flat(world.render(world.sample(seed), 128)) for seed in fitted_on])
        self.mean = flat.mean(0)
        _, spread, self.axes = np.linalg.svd(flat - self.mean, full_matrices=False)
        self.axes = self.axes[:count]
        self.explained = float((spread[:count] ** 2).sum() / (spread**2).sum())

    @staticmethod
    def _flat(video: np.ndarray) -> np.ndarray:
        difference = video[::4, :, :, 0] - video[::4, :, :, 2]
        frames, height, width = difference.shape
        return difference.reshape(frames, height // 8, 8, width // 4, 4).mean((2, 4)).ravel()

    def __call__(self, video: np.ndarray) -> np.ndarray:
        return self.axes @ (self._flat(video) - self.mean)


def frechet(made: np.ndarray, true: np.ndarray) -> float:
    """Fréchet distance between Gaussians fitted to features [N, D] and [M, D] (Heusel et al. 2017)."""
    covariances = [np.cov(features, rowvar=False) for features in (made, true)]
    # The trace of the root of a product of two covariances is the sum of the roots of its eigenvalues.
    values = np.linalg.eigvals(covariances[0] @ covariances[1])
    root = np.sqrt(np.clip(values.real, 0, None)).sum()
    apart = ((made.mean(0) - true.mean(0)) ** 2).sum()
    return float(apart + np.trace(covariances[0]) + np.trace(covariances[1]) - 2 * root)


def interval(values: np.ndarray, seed: int = 0, draws: int = 2000) -> dict[str, float]:
    """Mean and 95 % bootstrap interval over clips."""
    values = values[~np.isnan(values)]
    if not values.size:
        return {"mean": float("nan"), "low": float("nan"), "high": float("nan")}
    chosen = np.random.default_rng(seed).integers(len(values), size=(draws, len(values)))
    low, high = np.percentile(values[chosen].mean(1), [2.5, 97.5])
    return {"mean": float(values.mean()), "low": float(low), "high": float(high)}


def frechet_interval(made: np.ndarray, true: np.ndarray, seed: int = 0, draws: int = 200) -> dict[str, float]:
    """The distance, and its 95 % interval by leaving out half of the clips at random.

    A bootstrap would draw clips twice, which narrows their spread and raises the distance. A mean over a random half
    scatters about the mean over all as that one scatters about the truth (the delete-half jackknife).
    """
    random = np.random.default_rng(seed)
    half = len(made) // 2
    found = [frechet(made[random.permutation(len(made))[:half]], true) for _ in range(draws)]
    mean = frechet(made, true)
    low, high = np.percentile(np.array(found) - np.mean(found), [2.5, 97.5])
    return {"mean": mean, "low": mean + float(low), "high": mean + float(high)}
