"""Measures of generated videos, with confidence intervals."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from small_model import world

#: name -> (description, value of a perfect video)
MEASURES = {
    "presence": ("share of frames whose shapes are intact and correctly colored", 1.0),
    "exchanged": ("share of frames in which a lane shows the color of the other lane", 0.0),
    "mixed": ("share of frames in which a tenth of a shape or more has the color of the other lane", 0.0),
    "path_error": ("distance from the nearest possible path in image widths, over all frames", 0.0),
    "path_error_end": ("path error over the last quarter of the frames", 0.0),
    "jump": ("deviation of frame-to-frame motion from the true motion, in units of the true speed", 0.0),
    "largest_step": ("95th percentile of frame-to-frame motion, in units of the true speed", 1.0),
    "largest_stride": ("the same over 4 frames, in which jitter counts for a quarter as much", 1.0),
    "background_drift": ("change of the background color since the first frame, 0..1", 0.0),
    "frechet": ("Fréchet distance between features of generated and true videos", 0.0),
}
TRUE_CLIPS = range(2 * world.HELD_OUT, 2 * world.HELD_OUT + 512)  # compared to generated videos
FITTED_ON = range(3 * world.HELD_OUT, 3 * world.HELD_OUT + 512)  # used to fit the features


class Features:
    """Features of a video: 24 principal components of true videos.

    The input of the components is red minus blue in every 4th frame, averaged over cells of 4x8 pixels.

    Args:
        fitted_on: seeds of the true clips that the components are fitted to; not those of the comparison.
        count: number of components.
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


def frechet(generated: np.ndarray, true: np.ndarray) -> float:
    """Fréchet distance between Gaussians fitted to features of generated [N, D] and true videos [M, D].

    Reference: Heusel et al. 2017.
    """
    covariances = [np.cov(features, rowvar=False) for features in (generated, true)]
    # The trace of the matrix square root is the sum of the square roots of the eigenvalues.
    values = np.linalg.eigvals(covariances[0] @ covariances[1])
    root = np.sqrt(np.clip(values.real, 0, None)).sum()
    mean_distance = ((generated.mean(0) - true.mean(0)) ** 2).sum()
    return float(mean_distance + np.trace(covariances[0]) + np.trace(covariances[1]) - 2 * root)


def interval(values: np.ndarray, seed: int = 0, draws: int = 2000) -> dict[str, float]:
    """Mean over videos, and its 95% bootstrap interval."""
    values = values[~np.isnan(values)]
    if not values.size:
        return {"mean": float("nan"), "low": float("nan"), "high": float("nan")}
    chosen = np.random.default_rng(seed).integers(len(values), size=(draws, len(values)))
    low, high = np.percentile(values[chosen].mean(1), [2.5, 97.5])
    return {"mean": float(values.mean()), "low": float(low), "high": float(high)}


def frechet_interval(generated: np.ndarray, true: np.ndarray, seed: int = 0, draws: int = 200) -> dict[str, float]:
    """Fréchet distance and its 95% interval, from random halves of the videos (delete-half jackknife).

    A bootstrap would draw videos repeatedly, which reduces their variance and increases the distance. Results for
    random halves scatter around the result for all videos as much as that one scatters around the truth.
    """
    return _of_halves(lambda part: frechet(generated[part], true), len(generated), seed, draws)


def frechet_difference(
    generated: np.ndarray, other: np.ndarray, true: np.ndarray, seed: int = 0, draws: int = 200
) -> dict[str, float]:
    """Fréchet distance of videos minus that of others of the same clips, with its interval as in `frechet_interval`.

    Which clips were chosen moves both distances alike, so that the difference is known better than either of them.
    """

    def difference(part: np.ndarray) -> float:
        return frechet(generated[part], true) - frechet(other[part], true)

    return _of_halves(difference, len(generated), seed, draws)


def _of_halves(statistic: Callable[[np.ndarray], float], count: int, seed: int, draws: int) -> dict[str, float]:
    """A statistic of all of `count` videos, and its 95% interval from random halves of them."""
    random = np.random.default_rng(seed)
    found = [statistic(random.permutation(count)[: count // 2]) for _ in range(draws)]
    mean = statistic(np.arange(count))
    low, high = np.percentile(np.array(found) - np.mean(found), [2.5, 97.5])
    return {"mean": mean, "low": mean + float(low), "high": mean + float(high)}
