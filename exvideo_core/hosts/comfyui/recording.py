"""Keeps what a sampler takes the finished clip to be, at some of its steps."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from .wrapping import around_callback

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

    from .wrapping import StepCallback

_KEY = "exvideo_recording"


@dataclass
class Recording:
    """Predictions of the clean clip, of the last run of a sampler with the model that writes here.

    Attributes:
        wanted: steps to keep; they are spread evenly, the last one among them.
        steps: number of steps of the run.
        kept: step, from 1 -> latents [T, C, H, W], on the CPU.
    """

    wanted: int
    steps: int = 0
    kept: dict[int, torch.Tensor] = field(default_factory=dict)

    def begin(self, steps: int) -> None:
        self.steps = steps
        self.kept.clear()

    def step(self, step: int, denoised: torch.Tensor) -> None:
        """Called after each step, `step` counting from 0."""
        count = min(self.wanted, self.steps)
        if step + 1 in {(i + 1) * self.steps // count for i in range(count)}:
            self.kept[step + 1] = denoised.detach().to("cpu", torch.float32, copy=True)


def recorded(model: ModelPatcher, steps: int) -> tuple[ModelPatcher, Recording]:
    """A clone whose sampling is recorded, and where it is written."""
    recording = Recording(steps)

    @contextlib.contextmanager
    def kept(patcher: ModelPatcher, noise: torch.Tensor, callback: StepCallback) -> Iterator[StepCallback]:
        recording.begin(0)

        def keep(step: int, denoised: torch.Tensor, x: torch.Tensor, steps: int) -> None:
            if steps != recording.steps:
                recording.begin(steps)
            # Samplers hand the model's own scale over; latents of the host's graph are in the VAE's.
            recording.step(step, patcher.model.process_latent_out(denoised.to(torch.float32)))
            if callback is not None:
                callback(step, denoised, x, steps)

        yield keep

    clone = model.clone()
    around_callback(clone, _KEY, kept)
    return clone, recording
