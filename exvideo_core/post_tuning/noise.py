"""Distributions of the noise levels that training draws from."""

from __future__ import annotations

import math

import torch

from ..choices import NoiseKind
from ..method.noise_levels import SIGMA_MAX, SIGMA_MIN
from .loss import RAMP_STEPS, sigma_ramp


def noise_levels(
    kind: NoiseKind = "ramp",
    *,
    low: float = 0.3,
    high: float = 20.0,
    mean: float = 1.0,
    deviation: float = 1.6,
    share: float = 1.0,
    count: int = RAMP_STEPS,
) -> torch.Tensor:
    """Noise levels to draw from with equal probability.

    Args:
        kind: `ramp` is the Karras ramp of the reference. `interval` is log-uniform between `low` and `high`.
            `lognormal` has a normal logarithm with the given `mean` and `deviation` (Karras et al. 2022, section 5),
            as in SVD's own training, and is clamped to the ends of the ramp.
        low: lowest noise level of the interval.
        high: highest noise level of the interval.
        mean: mean of the logarithm.
        deviation: standard deviation of the logarithm.
        share: share of levels drawn from `kind`. The rest comes from the ramp.
        count: number of levels.

    Returns:
        [count] in float32, highest first.
    """
    special = round(count * share)
    if kind == "ramp" or not special:
        return sigma_ramp(count)
    places = (torch.arange(special, dtype=torch.float64) + 0.5) / special
    if kind == "interval":
        levels = math.log(low) + places * (math.log(high) - math.log(low))
    else:
        levels = mean + deviation * torch.special.ndtri(places)
    drawn = levels.exp().clamp(SIGMA_MIN, SIGMA_MAX).float()
    return torch.cat([drawn, sigma_ramp(count - special)]).sort(descending=True).values
