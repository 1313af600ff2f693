"""Step distillation: an extension that needs a few calls of the UNet per video, made from one that needs many.

The sampler's noise levels for K calls, s_0 > s_1 > ... > s_K = 0, divide the teacher's path into K phases. A student's
call is to predict where the path leaves the phase, so that the student needs one Euler step per phase. With a noise
level sigma_n in a phase that ends at s, a noisy clip x_n = x + sigma_n noise and D the predicted clean latents:

- The teacher takes m Euler steps from x_n to x_{n+m}, each x_{i+1} = D_T + (x_i - D_T) sigma_{i+1} / sigma_i, where
  guidance w is folded in: D_T = D(negative) + w (D(positive) - D(negative)).
- The target network, a moving average of the student, steps from there to the phase's end:
  x_s = D_E + (x_{n+m} - D_E) s / sigma_{n+m}; x_s = x_{n+m} where sigma_{n+m} = s.
- The student's step has to end there: D = (x_s - x_n s / sigma_n) / (1 - s / sigma_n).

There are two kinds of targets:

- `consistency`: m = 1, and sigma_n is any of the teacher's noise levels. This is consistency distillation (Song et al.
  2023, arXiv 2303.01469; for latent diffusion with guidance: LCM, Luo et al. 2023, arXiv 2310.04378) in phases (PCM,
  Wang et al. 2024, arXiv 2405.18407). For K = 1, D = D_E. EDM's parametrization meets its boundary condition: at noise
  levels near 0, D(x) = x.
- `progressive`: sigma_n is the start of a phase, and the teacher itself goes to the phase's end (progressive
  distillation, Salimans and Ho 2022, arXiv 2202.00512, in one round). There is no target network, whose errors the
  student would learn too; a target costs m calls of the teacher.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from ..choices import DistillTarget
from ..method.noise_levels import SIGMA_MIN, karras
from .loss import VideoUNet, denoise, loss_weight, sigma_ramp
from .samples import Sample

#: Predicts clean latents [B, T, 4, H, W] from noisy ones and their noise levels [B].
Denoise = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def phase_levels(steps: int, sigma_max: float, sigma_min: float) -> torch.Tensor:
    """Noise levels of a sampler with few steps: Karras levels (Karras et al. 2022, eq. 5), and 0 [steps + 1].

    ComfyUI's node *KarrasScheduler* gives the same ones.
    """
    return torch.cat([karras(steps, sigma_max, sigma_min), torch.zeros(1)])


@dataclass(frozen=True)
class Paths:
    """Where the teacher steps, from each of N noise levels.

    Attributes:
        levels: noise levels to start from, in descending order [N].
        steps: noise levels of the teacher's steps from there, the first of which is the start [N, m + 1].
        ends: end of the phase that the start belongs to [N].
    """

    levels: torch.Tensor
    steps: torch.Tensor
    ends: torch.Tensor

    @classmethod
    def of(cls, phases: torch.Tensor, teacher_steps: int, target: DistillTarget) -> Paths:
        """The teacher's steps for a kind of target.

        Args:
            phases: of `phase_levels` [K + 1].
            teacher_steps: number of the teacher's noise levels: for `consistency`, those of the published ramp; for
                `progressive`, divided among the phases and rounded up.
            target: kind of target.
        """
        if target == "progressive":
            share = -(-teacher_steps // (len(phases) - 1))
            pairs = zip(phases[:-1].tolist(), phases[1:].tolist(), strict=True)
            parts = [torch.cat([karras(share + 1, start, max(end, SIGMA_MIN))[:-1], torch.tensor([end])])
                     for start, end in pairs]  # fmt: skip
            return cls(phases[:-1], torch.stack(parts), phases[1:])
        ramp = sigma_ramp(teacher_steps)
        levels = torch.cat([ramp[ramp < phases[0]], phases]).unique().flip(0)
        below = phases[None] < levels[:-1, None]
        ends = torch.where(below, phases[None], phases.new_tensor(-1.0)).max(1).values
        return cls(levels[:-1], torch.stack([levels[:-1], levels[1:]], dim=1), ends)

    def to(self, device: torch.device) -> Paths:
        """A copy on a device."""
        return Paths(self.levels.to(device), self.steps.to(device), self.ends.to(device))


def student_target(
    teacher: Denoise, average: Denoise | None, noisy: torch.Tensor, steps: torch.Tensor, end: torch.Tensor
) -> torch.Tensor:
    """The clean latents that the student is to predict, see the module's formulas.

    Args:
        teacher: D_T.
        average: D_E, or None if the teacher's last step always ends at s.
        noisy: x_n [B, T, 4, H, W].
        steps: sigma_n, ..., sigma_{n+m} [B, m + 1].
        end: s [B].

    Returns:
        D [B, T, 4, H, W].
    """

    def wide(levels: torch.Tensor) -> torch.Tensor:
        return levels.view(-1, 1, 1, 1, 1)

    x = noisy
    for sigma, lower in zip(steps[:, :-1].unbind(1), steps[:, 1:].unbind(1), strict=True):
        clean = teacher(x, sigma)
        x = clean + (x - clean) * wide(lower / sigma)
    if average is not None:
        last = steps[:, -1]
        arrived = last <= end
        # Noise levels of 0 cannot be denoised, and need not be: such steps have arrived.
        level = torch.where(arrived, steps[:, 0], last)
        predicted = average(x, level)
        x = torch.where(wide(arrived), x, predicted + (x - predicted) * wide(end / level))
    share = wide(end / steps[:, 0])
    return (x - noisy * share) / (1 - share)


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
    """The teacher's and the target network's weights, and the teacher's steps.

    Only an extension's weights differ between the three networks; its base is shared. The teacher is the extension
    that the run starts from.

    Args:
        weights: the extension's weights by name, from which all three start.
        paths: where the teacher steps.
        guidance: classifier-free guidance of the teacher (1: none).
        decay: of the target network per step.
    """

    def __init__(self, weights: Mapping[str, torch.Tensor], paths: Paths, guidance: float, decay: float) -> None:
        self.teacher = {name: weight.detach().clone() for name, weight in weights.items()}
        self.average = {name: weight.detach().clone() for name, weight in weights.items()}
        self.paths = paths
        self.alone = bool((paths.steps[:, -1] == paths.ends).all())
        self.guidance = guidance
        self.decay = decay

    def place(self, sample: Sample) -> tuple[Sample, torch.Tensor, torch.Tensor]:
        """Move clips to the nearest noise level that the teacher starts from.

        At the highest one, clips become pure noise, since that is what sampling starts from.

        Returns:
            the clips, the noise levels of the teacher's steps [B, m + 1], and the phase's end [B].
        """
        paths = self.paths.to(sample.sigma.device)
        nearest = (sample.sigma[:, None].log() - paths.levels[None].log()).abs().argmin(1)
        latents = sample.latents * (nearest > 0).view(-1, 1, 1, 1, 1)
        return replace(sample, latents=latents, sigma=paths.levels[nearest]), paths.steps[nearest], paths.ends[nearest]

    @torch.no_grad()
    def target(
        self,
        with_weights: Callable[[Mapping[str, torch.Tensor]], VideoUNet],
        noisy: torch.Tensor,
        sample: Sample,
        steps: torch.Tensor,
        end: torch.Tensor,
    ) -> torch.Tensor:
        """`student_target` of a batch, whose `sigma` is a noise level that the teacher starts from [B, T, 4, H, W].

        Args:
            with_weights: a UNet with other weights, to be called before this function is called again.
            noisy, sample, steps, end: as for `student_target` and `place`.
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

        return student_target(guided, None if self.alone else averaged, noisy, steps, end)

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
