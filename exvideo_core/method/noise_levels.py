"""SVD's noise levels."""

from __future__ import annotations

import torch

#: Ends and exponent of SVD's schedule, as in the reference's `ContinuousODEScheduler`.
SIGMA_MAX, SIGMA_MIN, RHO = 700.0, 0.002, 7.0


def karras(steps: int, sigma_max: float = SIGMA_MAX, sigma_min: float = SIGMA_MIN) -> torch.Tensor:
    """Noise levels from `sigma_max` down to `sigma_min` [steps], in float32 (Karras et al. 2022, eq. 5)."""
    places = torch.linspace(0, 1, steps, dtype=torch.float64)
    ends = sigma_max ** (1 / RHO), sigma_min ** (1 / RHO)
    return ((ends[0] + places * (ends[1] - ends[0])) ** RHO).float()
