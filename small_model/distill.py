"""Distill the small model for few denoising steps in large batches.

    python -m small_model.distill --out FOLDER --base MODEL --init EXTENSION [--calls 4] [--device cuda --seconds 120]
    python -m small_model.distill --out FOLDER --base MODEL [--calls 4]
    python -m small_model.distill --out FOLDER --base MODEL --init EXTENSION --onto DISTILLED_MODEL [--calls 4]

With `--init`, an extension is distilled into an extension, as `objective: distill` of `exvideo_core.post_tuning` does
it; without, the base itself with all its weights. With `--onto`, the resulting extension is one for a base that was
distilled before. The run resumes from its last saved state.
"""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import torch

from exvideo_core.choices import DistillTarget
from exvideo_core.diffusers import checkpoint, patch
from exvideo_core.diffusers.checkpoint import SVD
from exvideo_core.method.extension import Extension, FewSteps
from exvideo_core.method.noise_levels import SIGMA_MAX
from exvideo_core.post_tuning.distillation import Distillation, Paths, distillation_loss, phase_levels, with_weights
from exvideo_core.post_tuning.loss import VideoUNet, denoise, loss_weight
from exvideo_core.post_tuning.samples import Sample
from exvideo_core.post_tuning.selection import select

from . import base, extension
from .bank import Bank
from .options import add_options, prepare
from .recipe import GUIDANCE
from .training import Learner, Plan

_log = logging.getLogger("small_model")


class Student(Learner):
    """Trains a UNet to reach the end of each phase of its own path in one step, see `Distillation`.

    Args:
        unet: the teacher, from which student and target network start.
        groups: as for `Learner`.
        plan: as for `Learner`. Its noise levels are the teacher's.
        paths: where the teacher steps.
        guidance: classifier-free guidance of the teacher.
        decay: of the target network per step.
        dtype: as for `Learner`.
        graph: as for `Learner`.
        compiled: as for `Learner`.
        teacher: another UNet as the teacher.
    """

    def __init__(
        self,
        unet: torch.nn.Module,
        groups: Sequence[tuple[Sequence[torch.nn.Parameter], float]],
        plan: Plan,
        paths: Paths,
        guidance: float,
        decay: float,
        dtype: torch.dtype = torch.float32,
        graph: bool = False,
        compiled: bool = False,
        teacher: VideoUNet | None = None,
    ) -> None:
        super().__init__(unet, groups, plan, dtype, graph, compiled)
        self.teacher = teacher
        # Copied only once, because a copy to a GPU waits for all running kernels.
        weights = dict(zip(self.names, self.live, strict=True))
        self.distillation = Distillation(weights, paths.to(self.device), guidance, decay)
        # The moving average needs float32: in bfloat16, it would miss small changes.
        self.targets = [master.clone() for master in self.masters]
        self.buffers["steps"] = torch.zeros(plan.batch, paths.steps.shape[1], device=self.device)
        self.buffers["end"] = torch.zeros(plan.batch, device=self.device)

    def fill(self, bank: Bank) -> None:
        super().fill(bank)
        sample, steps, end = self.distillation.place(self._sample())
        self.buffers["latents"].copy_(sample.latents)
        self.buffers["steps"].copy_(steps)
        self.buffers["end"].copy_(end)

    def _sample(self) -> Sample:
        return Sample(*(self.buffers[name] for name in ("latents", "noise", "sigma", "first", "embedding", "ids")))

    def _compute(self) -> None:
        sample, steps, end = self._sample(), self.buffers["steps"], self.buffers["end"]
        noisy = sample.latents + sample.noise * sample.sigma.view(-1, 1, 1, 1, 1)
        # Before the student's call, whose backward pass needs the student's weights in the UNet.
        target = self._target(noisy, sample, steps, end)
        with self.attention():
            denoised = denoise(self.call, noisy, sample.sigma, sample.first, sample.embedding, sample.ids)
        distillation_loss(denoised, target, sample.sigma, end)[1].backward()
        self.errors.copy_((denoised.detach() - target).square().flatten(1).mean(1))

    def _take(self, weights: Mapping[str, torch.Tensor]) -> VideoUNet:
        """The UNet, to which other weights are copied, which works for compiled ones too."""
        if self.teacher is not None and weights is self.distillation.teacher:
            return self.teacher
        torch._foreach_copy_(self.live, [weights[name] for name in self.names])
        return self.call

    @torch.no_grad()
    def _target(self, noisy: torch.Tensor, sample: Sample, steps: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
        found = self.distillation.target(self._take, noisy, sample, steps, end)
        torch._foreach_copy_(self.live, self.masters)
        return found

    def descend(self, bank: Bank, rate: float) -> None:
        super().descend(bank, rate)
        self._update_targets(1 - self.distillation.decay)

    @torch.no_grad()
    def _update_targets(self, share: float) -> None:
        torch._foreach_lerp_(self.targets, self.masters, share)
        torch._foreach_copy_([self.distillation.average[name] for name in self.names], self.targets)

    def state(self) -> dict[str, Any]:
        return {**super().state(), "targets": self.targets}

    def restore(self, state: dict[str, Any]) -> None:
        super().restore(state)
        torch._foreach_copy_(self.targets, state["targets"])
        self._update_targets(0.0)


def paths_of(options: argparse.Namespace) -> Paths:
    """Where the teacher steps."""
    phases = phase_levels(options.calls, options.sigma_max, options.sigma_min)
    return Paths.of(phases, options.teacher_steps, options.target)


def plan_of(options: argparse.Namespace, frames: int) -> Plan:
    """The plan of a distillation, whose noise levels are those that the teacher starts from."""
    return Plan(
        frames=frames, batch=options.batch, rate=options.rate, warmup=options.warmup, levels=paths_of(options).levels,
        weight=loss_weight, steps=options.steps, seconds=options.seconds, ema=options.ema, seed=options.seed,
        muon=options.muon,
    )  # fmt: skip


def _extended(base: Path, extension: Path | None) -> SVD:
    svd = checkpoint.load(base)
    if extension is not None:
        patch.apply(svd.unet, Extension.load(extension))
    return svd


def _teacher(unet: torch.nn.Module) -> VideoUNet:
    """A UNet in its own type that is not trained."""
    return with_weights(unet, {name: weight.detach() for name, weight in unet.named_parameters()})


def train(options: argparse.Namespace) -> None:
    """Distill an extension, or the base."""
    out: Path = options.out
    dtype = torch.bfloat16 if options.bf16 else torch.float32
    svd = _extended(options.onto or options.base, options.init)
    teacher = _teacher(_extended(options.base, options.init).unet.to(options.device, dtype)) if options.onto else None
    unet = svd.unet
    for part in (unet, svd.vae, svd.image_encoder):
        part.to(options.device)
    if options.init:
        parts = select(unet, positions=True, convolution=True, attention=True)
        groups = [(part, options.positions_rate if name == "positions" else 1.0) for name, part in parts.items()]
    else:
        groups = [(list(unet.parameters()), 1.0)]
    plan = plan_of(options, extension.FRAMES if options.init else base.FRAMES)
    bank = Bank.encode(svd.vae, svd.image_encoder, range(options.clips), options.clip_frames)
    student = Student(
        unet.train(), groups, plan, paths_of(options), options.guidance, options.decay,
        dtype, options.graph, options.compile, teacher,
    )  # fmt: skip
    student.resume(out / "distill-state.pt")
    student.train(bank, out / "distill-state.pt")
    if options.init:
        target = out / "few_steps.safetensors"
        weights = student.average()
        few_steps = FewSteps(options.calls, sigma_max=options.sigma_max, sigma_min=options.sigma_min)
        patch.collect(unet, weights, few_steps).save(f"{target}.part.safetensors")
        os.replace(f"{target}.part.safetensors", target)
    else:
        unet.float().load_state_dict(student.average(), strict=True)
        checkpoint.save(svd, out / "base_few_steps.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, batch=16, rate=2e-4)
    parser.add_argument("--base", type=Path, required=True, help="SVD model: a file or a diffusers folder")
    parser.add_argument("--init", type=Path, help="extension to distill (default: distill the base)")
    parser.add_argument("--onto", type=Path, help="distilled base that the resulting extension is for")
    parser.add_argument("--calls", type=int, default=4, help="denoising steps that the student needs")
    parser.add_argument("--sigma-max", type=float, default=SIGMA_MAX, help="noise level at which sampling starts")
    parser.add_argument("--sigma-min", type=float, default=1.0, help="noise level of the last step")
    parser.add_argument("--target", choices=get_args(DistillTarget), default="consistency", help="kind of target")
    parser.add_argument("--teacher-steps", type=int, default=25, help="noise levels between which the teacher steps")
    parser.add_argument("--guidance", type=float, default=GUIDANCE, help="classifier-free guidance of the teacher")
    parser.add_argument("--decay", type=float, default=0.95, help="decay of the target network per step")
    parser.add_argument("--positions-rate", type=float, default=5.0, help="factor on the position tables' rate")
    options = parser.parse_args()
    prepare(options)
    train(options)


if __name__ == "__main__":
    main()
