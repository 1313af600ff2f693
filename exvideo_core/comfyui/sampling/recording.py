"""Keeps the sampler's current prediction of the clean clip, at some of its steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..wrappers import around_callback

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

    from ..wrappers import StepCallback

_KEY = "exvideo_recording"
#: Runs stay until the newer ones take so many bytes.
_MOST_BYTES = 2**30
#: How alike (as a correlation) a run's result and a clip made from it are at least, after changes of contrast.
_ALIKE = 0.9


@dataclass(frozen=True)
class Run:
    """A sampler's run.

    Attributes:
        steps: how many there were.
        kept: step, from 1 -> the prediction then [T, C, H, W], float32 on the CPU.
        result: what came out [T, C, H, W], float32 on the CPU.
    """

    steps: int
    kept: Mapping[int, torch.Tensor]
    result: torch.Tensor

    @property
    def nbytes(self) -> int:
        return self.result.nbytes + sum(clip.nbytes for clip in self.kept.values())


class Recording:
    """The runs of samplers with one model.

    The host keeps results of samplers from one prompt to the next, and runs the same model in between: a clip is shown
    with the run that made it, not with the last one.
    """

    def __init__(self) -> None:
        self._runs: list[Run] = []

    def add(self, run: Run) -> None:
        self._runs.append(run)
        while len(self._runs) > 1 and sum(each.nbytes for each in self._runs) > _MOST_BYTES:
            del self._runs[0]

    def run_of(self, latents: torch.Tensor) -> Run:
        """The run that made a clip, with or without the clip's contrast changed since.

        Args:
            latents: [T, C, H, W].

        Raises:
            ValueError: there is none.
        """
        if not self._runs:
            raise ValueError(
                "The recording is empty. Give the sampler of this clip the model from ExVideo Record Denoising."
            )
        fitting = [run for run in self._runs if run.result.shape == latents.shape]
        if not fitting:
            sizes = tuple(self._runs[-1].result.shape), tuple(latents.shape)
            raise ValueError(
                f"The recording is of a clip of another size ({sizes[0]}), and this clip is {sizes[1]} (frames, "
                "channels, height, width). Give the sampler of this clip the model from ExVideo Record Denoising."
            )
        clip = latents.detach().to("cpu", torch.float32)
        alike = [_correlation(run.result, clip) for run in fitting]
        best = max(reversed(range(len(fitting))), key=alike.__getitem__)
        if alike[best] < _ALIKE:
            raise ValueError(
                "The recording holds no run that made this clip. Run the sampler of this clip again, with the model "
                "from ExVideo Record Denoising."
            )
        return fitting[best]


def recorded(model: ModelPatcher, steps: int) -> tuple[ModelPatcher, Recording]:
    """A clone whose sampling is recorded, and where.

    Args:
        steps: how many to keep of each run; they are spread evenly, the last one among them.
    """
    recording = Recording()

    def watched(
        patcher: ModelPatcher,
        noise: torch.Tensor,  # noqa: ARG001
        callback: StepCallback,
        run: Callable[[StepCallback], torch.Tensor],
    ) -> torch.Tensor:
        kept: dict[int, torch.Tensor] = {}
        total = 0

        def keep(step: int, denoised: torch.Tensor, x: torch.Tensor, count: int) -> None:
            nonlocal total
            if count != total:
                total = count
                kept.clear()
            chosen = min(steps, count)
            if step + 1 in {(i + 1) * count // chosen for i in range(chosen)}:
                # Samplers hand the model's own scale over; latents of the host's graph are in the VAE's.
                kept[step + 1] = _on_cpu(patcher.model.process_latent_out(denoised.to(torch.float32)))
            if callback is not None:
                callback(step, denoised, x, count)

        result = run(keep)
        if kept:
            recording.add(Run(total, kept, _on_cpu(result)))
        return result

    clone = model.clone()
    around_callback(clone, _KEY, watched)
    return clone, recording


def _on_cpu(clip: torch.Tensor) -> torch.Tensor:
    return clip.detach().to("cpu", torch.float32, copy=True)


def _correlation(first: torch.Tensor, second: torch.Tensor) -> float:
    """Mean over the frames of the correlation of two clips, which changes of contrast and brightness leave at 1."""
    centred = [clip.flatten(1) - clip.flatten(1).mean(1, keepdim=True) for clip in (first, second)]
    return torch.nn.functional.cosine_similarity(*centred, dim=1, eps=1e-12).mean().item()
