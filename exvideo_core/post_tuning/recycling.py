"""Error recycling: training on first frames that contain the model's own errors.

When videos are generated in windows, a window continues from a generated frame, which contains the model's errors.
Training on real clips never shows such frames, so errors add up from window to window. As in Stable Video Infinity
(Li et al. 2025, arXiv 2510.09212), errors made during training are stored and added to the first frames of later
clips, while the target remains the real clip.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from .samples import Sample


class ErrorBank:
    """The most recent errors of denoised frames.

    Args:
        size: number of errors to store.
        share: share of clips whose first frame gets an error.
        highest: highest noise level whose errors are stored. Above it, errors reflect open futures rather than faults.
        scaling: scaling factor of the VAE. Errors are scaled by it, first frames are not.
        seed: seed of all random choices, which also depend on the index of the sample.
    """

    def __init__(self, size: int, share: float, highest: float, scaling: float, seed: int) -> None:
        self.size = size
        self.share = share
        self.highest = highest
        self.scaling = scaling
        self.seed = seed
        self.errors: torch.Tensor | None = None  # [kept, 4, H, W], oldest first

    def _generator(self, number: int) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed * 1_000_003 + number + (1 << 40))

    def add_errors(self, sample: Sample, numbers: Sequence[int]) -> Sample:
        """Add errors to the first frames of a share of the clips.

        Args:
            sample: a batch of clips.
            numbers: sample indices of the clips.
        """
        if self.errors is None:
            return sample
        first = sample.first.clone()
        for place, number in enumerate(numbers):
            generator = self._generator(number)
            if torch.rand((), generator=generator) < self.share:
                chosen = int(torch.randint(len(self.errors), (), generator=generator))
                first[place] += self.errors[chosen].to(first) / self.scaling
        return replace(sample, first=first)

    @torch.no_grad()
    def add(self, denoised: torch.Tensor, sample: Sample, numbers: Sequence[int]) -> None:
        """Store the error of one frame of each clip with a low enough noise level.

        Args:
            denoised: the model's prediction of the clean latents [B, T, 4, H, W].
            sample: the clips.
            numbers: sample indices of the clips.
        """
        found = []
        for place, number in enumerate(numbers):
            frame = int(torch.randint(denoised.shape[1], (), generator=self._generator(number)))
            if float(sample.sigma[place]) <= self.highest:
                found.append((denoised[place, frame].float() - sample.latents[place, frame]).cpu())
        if found:
            kept = torch.stack(found) if self.errors is None else torch.cat([self.errors, torch.stack(found)])
            self.errors = kept[-self.size :]

    def state_dict(self) -> dict[str, torch.Tensor | None]:
        """State for checkpoints."""
        return {"errors": self.errors}

    def load_state_dict(self, state: dict[str, torch.Tensor | None]) -> None:
        """Restore the state of a checkpoint."""
        self.errors = state["errors"]
