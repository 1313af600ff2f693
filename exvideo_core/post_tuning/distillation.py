"""Step distillation: an extension that needs a few calls of the UNet per video, made from one that needs many.

Consistency distillation (Song et al. 2023, arXiv 2303.01469; for latent diffusion with guidance: LCM, Luo et al. 2023,
arXiv 2310.04378) in phases (PCM, Wang et al. 2024, arXiv 2405.18407). The sampler's noise levels for K calls,
s_0 > s_1 > ... > s_K = 0, divide the teacher's path into K phases. A student's call anywhere in a phase is to predict
where the path leaves it, so that the student needs one Euler step per phase.

With a teacher's noise levels sigma_n in descending order, the phase's end s <= sigma_{n+1}, a noisy clip
x_n = x + sigma_n noise and D the predicted clean latents:

- The teacher takes one Euler step: x' = D_T + (x_n - D_T) sigma_{n+1} / sigma_n, where guidance w is folded in:
  D_T = D(negative) + w (D(positive) - D(negative)).
- The target network, a moving average of the student, steps from x' to the phase's end:
  x_s = D_E + (x' - D_E) s / sigma_{n+1}; x_s = x' where sigma_{n+1} = s.
- The student's step has to end there: D = (x_s - x_n s / sigma_n) / (1 - s / sigma_n).

For K = 1, s = 0 and D = D_E, which is consistency distillation. EDM's parametrization meets its boundary condition:
at noise levels near 0, D(x) = x.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch

from .loss import SIGMA_MAX, SIGMA_MIN, VideoUNet, denoise, loss_weight, sigma_ramp
from .samples import Sample

#: Predicts clean latents [B, T, 4, H, W] from noisy ones and their noise levels [B].
Denoise = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def phase_levels(steps: int) -> torch.Tensor:
    """Noise levels of a sampler with few steps, evenly spaced in their logarithm, and 0 [steps + 1].

    ComfyUI's scheduler *sgm_uniform* gives the same ones for SVD.
    """
    places = torch.arange(steps, dtype=torch.float64) / steps
    levels = SIGMA_MAX * (SIGMA_MIN / SIGMA_MAX) ** places
    return torch.cat([levels, levels.new_zeros(1)]).float()


def path_levels(steps: int, teacher_steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The teacher's noise levels with the ends of the phases among them, and each one's phase end.

    Args:
        steps: number of phases.
        teacher_steps: number of the teacher's noise levels, on the published ramp.

    Returns:
        noise levels in descending order down to 0 [N + 1], and the ends of the phases that begin at or above each but
        the last [N].
    """
    ends = phase_levels(steps)
    levels = torch.cat([sigma_ramp(teacher_steps), ends]).unique().flip(0)
    below = ends[None] < levels[:-1, None]
    return levels, torch.where(below, ends[None], ends.new_tensor(-1.0)).max(1).values


def student_target(
    teacher: Denoise, average: Denoise, noisy: torch.Tensor, sigma: torch.Tensor, lower: torch.Tensor, end: torch.Tensor
) -> torch.Tensor:
    """The clean latents that the student is to predict, see the module's formulas.

    Args:
        teacher: D_T.
        average: D_E.
        noisy: x_n [B, T, 4, H, W].
        sigma: sigma_n [B].
        lower: sigma_{n+1} [B].
        end: s [B].

    Returns:
        D [B, T, 4, H, W].
    """

    def wide(levels: torch.Tensor) -> torch.Tensor:
        return levels.view(-1, 1, 1, 1, 1)

    clean = teacher(noisy, sigma)
    stepped = clean + (noisy - clean) * wide(lower / sigma)
    arrived = lower <= end
    # Noise levels of 0 cannot be denoised, and need not be: such steps have arrived.
    level = torch.where(arrived, sigma, lower)
    predicted = average(stepped, level)
    left = torch.where(wide(arrived), stepped, predicted + (stepped - predicted) * wide(end / level))
    share = wide(end / sigma)
    return (left - noisy * share) / (1 - share)


def distillation_loss(
    denoised: torch.Tensor, target: torch.Tensor, sigma: torch.Tensor, end: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean squared error of the student, unweighted and weighted by the published `loss_weight`.

    Errors are those at the phase's end, where they are (1 - s / sigma) times as large as in the clean latents.

    Args:
        denoised: predicted latents [B, T, 4, H, W].
        target: of `student_target` [B, T, 4, H, W].
        sigma: noise levels [B].
        end: ends of the phases [B].

    Returns:
        (unweighted error, loss), both scalars.
    """
    errors = (denoised.float() - target.float()).square().flatten(1).mean(1) * (1 - end / sigma).square()
    return errors.mean(), (errors * loss_weight(sigma)).mean()


class Distillation:
    """The teacher's and the target network's weights, and the schedule.

    Only an extension's weights differ between the three networks; its base is shared. The teacher is the extension
    that the run starts from.

    Args:
        weights: the extension's weights by name, from which all three start.
        steps: number of phases, which are the calls of the finished extension.
        teacher_steps: number of the teacher's noise levels.
        guidance: classifier-free guidance of the teacher (1: none).
        decay: of the target network per step.
    """

    def __init__(
        self, weights: Mapping[str, torch.Tensor], steps: int, teacher_steps: int, guidance: float, decay: float
    ) -> None:
        self.teacher = {name: weight.detach().clone() for name, weight in weights.items()}
        self.average = {name: weight.detach().clone() for name, weight in weights.items()}
        self.levels, self.ends = path_levels(steps, teacher_steps)
        self.guidance = guidance
        self.decay = decay

    def place(self, sample: Sample) -> tuple[Sample, torch.Tensor, torch.Tensor]:
        """Move clips to the nearest of the teacher's noise levels.

        Returns:
            the clips, the next lower noise level [B], and the phase's end [B].
        """
        levels = self.levels.to(sample.sigma)
        nearest = (sample.sigma[:, None].log() - levels[None, :-1].log()).abs().argmin(1)
        return replace(sample, sigma=levels[nearest]), levels[nearest + 1], self.ends.to(sample.sigma)[nearest]

    @torch.no_grad()
    def target(
        self,
        with_weights: Callable[[Mapping[str, torch.Tensor]], VideoUNet],
        noisy: torch.Tensor,
        sample: Sample,
        lower: torch.Tensor,
        end: torch.Tensor,
    ) -> torch.Tensor:
        """`student_target` of a batch, whose `sigma` is one of the teacher's noise levels [B, T, 4, H, W].

        Args:
            with_weights: a UNet with other weights, to be called before this function is called again.
            noisy, sample, lower, end: as for `student_target` and `place`.
        """

        def guided(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
            teacher = with_weights(self.teacher)
            positive = denoise(teacher, x, sigma, sample.first, sample.embedding, sample.ids)
            if self.guidance == 1:
                return positive
            nothing = torch.zeros_like(sample.first), torch.zeros_like(sample.embedding)
            negative = denoise(teacher, x, sigma, *nothing, sample.ids)
            return negative + self.guidance * (positive - negative)

        def averaged(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
            return denoise(with_weights(self.average), x, sigma, sample.first, sample.embedding, sample.ids)

        return student_target(guided, averaged, noisy, sample.sigma, lower, end)

    @torch.no_grad()
    def update(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Update the target network from the student's weights."""
        for name, value in self.average.items():
            value.lerp_(weights[name].detach().to(value), 1 - self.decay)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """State for checkpoints: the teacher's weights are those of the run's initial extension."""
        return self.average

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Restore the state."""
        for name, value in self.average.items():
            value.copy_(state[name])


def with_weights(unet: torch.nn.Module, weights: Mapping[str, torch.Tensor]) -> VideoUNet:
    """A UNet with other weights in place of its own, for one call at a time, in the type of these weights."""
    dtype = next(iter(weights.values())).dtype

    def call(
        sample: torch.Tensor, timestep: torch.Tensor, embedding: torch.Tensor, ids: torch.Tensor, return_dict: bool
    ) -> tuple[torch.Tensor]:
        arguments = sample.to(dtype), timestep, embedding.to(dtype), ids
        return torch.func.functional_call(unet, dict(weights), arguments, {"return_dict": return_dict})

    return call
