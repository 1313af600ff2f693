"""Records the sampler's prediction of the clean video (x0) at some of its steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..wrappers import wrap_callback

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

    from ..wrappers import StepCallback

_KEY = "exvideo_recording"
#: Old runs are dropped if all runs together exceed this size.
_MAX_BYTES = 2**30
#: Minimum correlation of a run's result with a latent derived from it.
_MIN_CORRELATION = 0.9


@dataclass(frozen=True)
class Run:
    """A sampler's run.

    Attributes:
        steps: number of steps.
        x0: step, from 1 -> prediction of the clean video [T, C, H, W], float32 on the CPU.
        result: the sampled latent [T, C, H, W], float32 on the CPU.
    """

    steps: int
    x0: Mapping[int, torch.Tensor]
    result: torch.Tensor

    @property
    def nbytes(self) -> int:
        """Size of all tensors, in bytes."""
        return self.result.nbytes + sum(x0.nbytes for x0 in self.x0.values())


class Recording:
    """The runs of all samplers with one model.

    ComfyUI caches results between prompts and may run the same model in the meantime, so that a latent's run is not
    always the last one.
    """

    def __init__(self) -> None:
        self._runs: list[Run] = []

    def add(self, run: Run) -> None:
        """Add a run, and drop old ones if the recording gets too large."""
        self._runs.append(run)
        while len(self._runs) > 1 and sum(each.nbytes for each in self._runs) > _MAX_BYTES:
            del self._runs[0]

    def find_run(self, latents: torch.Tensor) -> Run:
        """The run that made a latent, even if the latent's contrast has been changed since.

        Args:
            latents: [T, C, H, W].

        Raises:
            ValueError: no recorded run made it.
        """
        if not self._runs:
            raise ValueError(
                "The recording is empty. Connect the model from ExVideo Record Denoising to this latent's sampler."
            )
        fitting = [run for run in self._runs if run.result.shape == latents.shape]
        if not fitting:
            sizes = tuple(self._runs[-1].result.shape), tuple(latents.shape)
            raise ValueError(
                f"The recording has a different size ({sizes[0]}) than this latent ({sizes[1]}; frames, channels, "
                "height, width). Connect the model from ExVideo Record Denoising to this latent's sampler."
            )
        video = latents.detach().to("cpu", torch.float32)
        similar = [_correlation(run.result, video) for run in fitting]
        best = max(reversed(range(len(fitting))), key=similar.__getitem__)
        if similar[best] < _MIN_CORRELATION:
            raise ValueError(
                "No recorded run made this latent. Connect the model from ExVideo Record Denoising to this latent's "
                "sampler and run it again."
            )
        return fitting[best]


def record_sampling(model: ModelPatcher, steps: int) -> tuple[ModelPatcher, Recording]:
    """A clone whose samplings are recorded, and the recording.

    Args:
        steps: how many steps to keep per run; they are spread evenly and include the last one.
    """
    recording = Recording()

    def sample(
        patcher: ModelPatcher,
        noise: torch.Tensor,  # noqa: ARG001
        callback: StepCallback,
        run: Callable[[StepCallback], torch.Tensor],
    ) -> torch.Tensor:
        kept: dict[int, torch.Tensor] = {}
        total = 0

        def keep(step: int, x0: torch.Tensor, x: torch.Tensor, count: int) -> None:
            nonlocal total
            if count != total:
                total = count
                kept.clear()
            chosen = min(steps, count)
            if step + 1 in {(i + 1) * count // chosen for i in range(chosen)}:
                # Samplers work in the model's scale; latents between nodes are in the VAE's.
                kept[step + 1] = _on_cpu(patcher.model.process_latent_out(x0.to(torch.float32)))
            if callback is not None:
                callback(step, x0, x, count)

        result = run(keep)
        if kept:
            recording.add(Run(total, kept, _on_cpu(result)))
        return result

    clone = model.clone()
    wrap_callback(clone, _KEY, sample)
    return clone, recording


def _on_cpu(video: torch.Tensor) -> torch.Tensor:
    return video.detach().to("cpu", torch.float32, copy=True)


def _correlation(first: torch.Tensor, second: torch.Tensor) -> float:
    """Mean correlation of the frames of two videos; contrast and brightness do not affect it."""
    centered = [video.flatten(1) - video.flatten(1).mean(1, keepdim=True) for video in (first, second)]
    return torch.nn.functional.cosine_similarity(*centered, dim=1, eps=1e-12).mean().item()
