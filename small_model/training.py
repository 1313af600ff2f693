"""Training loop of the small UNets, for CPUs and GPUs.

On a GPU, launching the thousands of kernels of so small a UNet takes longer than running them. Forward and backward
pass can therefore be captured as a CUDA graph and replayed.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from exvideo_core.post_tuning.loss import denoise

from .bank import Bank
from .first_stage import SCALING

FPS = 30
_BANDS = 8  # bands of noise levels whose errors are logged
_ERRORS = 512  # errors of denoised frames that are kept
_HIGHEST = 3.0  # noise level above which errors are not kept, because they reflect open futures
_log = logging.getLogger("small_model")


@dataclass(frozen=True)
class Plan:
    """Settings of a training run.

    Attributes:
        frames: frames per clip.
        batch: clips per step.
        rate: maximum learning rate, followed by a cosine decay to 0.
        levels: noise levels to draw from with equal probability, highest first.
        weight: maps noise levels [B] to the weights of their squared errors.
        augmentations: noise augmentation strengths, one of which is drawn per clip and passed to the UNet.
        warmup: warm-up steps, in which the learning rate rises from 0.
        steps: steps to train (0: unlimited).
        seconds: time to train (0: unlimited).
        ema: decay of the moving average (EMA) per step.
        seed: seed of clips and noise.
        muon: update matrices and convolutions with Muon (Jordan et al. 2024) instead of AdamW.
        recycle: share of clips whose first frame gets an error that the model made before, as in
            `exvideo_core.post_tuning.recycling`.
        skips: distances of a window's frames in its clip, one of which is drawn per window. The frame rate that the
            UNet is told is divided by it.
    """

    frames: int
    batch: int
    rate: float
    levels: torch.Tensor
    weight: Callable[[torch.Tensor], torch.Tensor]
    augmentations: tuple[float, ...] = (0.0,)
    warmup: int = 100
    steps: int = 0
    seconds: float = 0.0
    ema: float = 0.998
    seed: int = 0
    muon: bool = False
    recycle: float = 0.0
    skips: tuple[int, ...] = (1,)


class Learner:
    """Trains a UNet with float32 master weights and keeps their moving average.

    Args:
        unet: the UNet, converted to `dtype`. The master weights are copied to it after every step.
        groups: groups of trained parameters, each with a factor on the learning rate.
        plan: settings of the run.
        dtype: type that the UNet computes in.
        graph: capture forward and backward pass as a CUDA graph.
        compiled: compile the UNet.
    """

    def __init__(
        self,
        unet: torch.nn.Module,
        groups: Sequence[tuple[Sequence[torch.nn.Parameter], float]],
        plan: Plan,
        dtype: torch.dtype = torch.float32,
        graph: bool = False,
        compiled: bool = False,
    ) -> None:
        self.unet = torch.compile(unet, dynamic=False) if compiled else unet
        self.plan = plan
        self.dtype = dtype
        self.live = [parameter for group, _ in groups for parameter in group]
        named = {id(parameter): name for name, parameter in unet.named_parameters()}
        self.names = [named[id(parameter)] for parameter in self.live]
        self.masters = [parameter.detach().float().clone() for parameter in self.live]
        self.ema = [master.clone() for master in self.masters]
        for master in self.masters:
            master.grad = torch.zeros_like(master)
        self.optimizers = _optimizers(self.masters, groups, plan)
        unet.to(dtype)
        self.step = 0
        self.elapsed = 0.0
        self.slower = 1.0
        self.graph = graph
        self._replay: Callable[[], None] | None = None
        device = self.masters[0].device
        self.device = device
        batch, frames = plan.batch, plan.frames
        self.buffers = {
            "latents": torch.zeros(batch, frames, 4, 8, 8, device=device),
            "noise": torch.zeros(batch, frames, 4, 8, 8, device=device),
            "sigma": torch.ones(batch, device=device),
            "first": torch.zeros(batch, 4, 8, 8, device=device),
            "embedding": torch.zeros(batch, 1, unet.config.cross_attention_dim, device=device),
            "ids": torch.zeros(batch, 3, device=device),
        }
        self.errors = torch.zeros(batch, device=device)
        self.recycled = torch.zeros(_ERRORS, 4, 8, 8, device=device)
        self.denoised = self.buffers["latents"]
        # Copied only once, because a copy to a GPU waits for all running kernels.
        self.levels, self.augmentations = plan.levels.to(device), torch.tensor(plan.augmentations, device=device)
        self.skips = torch.tensor(plan.skips, device=device)

    def call(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        added_time_ids: torch.Tensor,
        return_dict: bool = False,
    ) -> tuple[torch.Tensor]:
        """Call the UNet in its own type. Times and ids stay in float32 until they are embedded."""
        cast = sample.to(self.dtype), encoder_hidden_states.to(self.dtype)
        return self.unet(cast[0], timestep, cast[1], added_time_ids, return_dict=return_dict)

    def attention(self) -> contextlib.AbstractContextManager[None]:
        """Context of a call with a backward pass, which on CPUs in bfloat16 is slow with fused attention."""
        slow = self.device.type == "cpu" and self.dtype == torch.bfloat16
        return sdpa_kernel(SDPBackend.MATH) if slow else contextlib.nullcontext()

    def _compute(self) -> None:
        """Compute errors and gradients of the clips in the buffers."""
        b = self.buffers
        noisy = b["latents"] + b["noise"] * b["sigma"].view(-1, 1, 1, 1, 1)
        with self.attention():
            clean = denoise(self.call, noisy, b["sigma"], b["first"], b["embedding"], b["ids"])
        errors = (clean - b["latents"]).square().flatten(1).mean(1)
        (errors * self.plan.weight(b["sigma"])).mean().backward()
        self.errors.copy_(errors.detach())
        self.denoised = clean.detach()

    def _clear(self) -> None:
        for parameter in self.live:
            parameter.grad = None

    def capture(self) -> None:
        """Run the step a few times, so that libraries select their kernels, and capture it."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self._clear()
                self._compute()
        torch.cuda.current_stream().wait_stream(stream)
        self._clear()
        recorded = torch.cuda.CUDAGraph()
        with torch.cuda.graph(recorded):
            self._compute()
        self._replay = recorded.replay

    def fill(self, bank: Bank) -> None:
        """Draw clips, noise and noise levels, which depend only on the seed and the step."""
        plan, device = self.plan, self.device
        generator = torch.Generator(device).manual_seed(plan.seed * 1_000_000_007 + self.step)
        skips = self.skips[torch.randint(len(self.skips), (plan.batch,), generator=generator, device=device)]
        windows = bank.draw(plan.batch, plan.frames, generator, skips)
        # One draw per stratum of noise levels, so that every batch contains high and low noise.
        places = torch.arange(plan.batch, device=device) + torch.rand(plan.batch, generator=generator, device=device)
        count = len(self.levels)
        sigma = self.levels[(places / plan.batch * count).long().clamp_max(count - 1)]
        choice = torch.randint(len(self.augmentations), (plan.batch,), generator=generator, device=device)
        augmented = self.augmentations[choice]
        first = windows.latents[:, 0]
        noise = torch.randn(first.shape, generator=generator, device=device) * augmented.view(-1, 1, 1, 1)
        ids = torch.stack([FPS / skips - 1.0, windows.bucket, augmented], dim=1)
        if plan.recycle:
            with_error = torch.rand(plan.batch, generator=generator, device=device) < plan.recycle
            chosen = torch.randint(_ERRORS, (plan.batch,), generator=generator, device=device)
            noise = noise + self.recycled[chosen] * with_error.view(-1, 1, 1, 1)
        b = self.buffers
        b["latents"].copy_(windows.latents)
        b["noise"].copy_(torch.randn(b["noise"].shape, generator=generator, device=device))
        b["sigma"].copy_(sigma)
        b["first"].copy_((first + noise) / SCALING)
        b["embedding"].copy_(windows.embedding)
        b["ids"].copy_(ids)

    def _keep_errors(self) -> None:
        """Keep the error of one frame of each clip, in place of the oldest ones."""
        batch = self.plan.batch
        every = torch.arange(batch, device=self.device)
        frame = (self.step * 37 + every * 11) % self.plan.frames
        places = (self.step * batch + every) % _ERRORS
        found = self.denoised[every, frame] - self.buffers["latents"][every, frame]
        usable = (self.buffers["sigma"] <= _HIGHEST).view(-1, 1, 1, 1)
        self.recycled[places] = torch.where(usable, found, self.recycled[places])

    def descend(self, bank: Bank, rate: float) -> None:
        """Run one optimizer step."""
        self.fill(bank)
        if self.graph and self._replay is None:
            self.capture()
        if self._replay is not None:
            self._replay()
        else:
            self._clear()
            self._compute()
        if self.plan.recycle:
            self._keep_errors()
        torch._foreach_copy_([master.grad for master in self.masters], [parameter.grad for parameter in self.live])
        torch.nn.utils.clip_grad_norm_(self.masters, 1.0, foreach=True)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * group["multiple"]
            optimizer.step()
        decay = min(self.plan.ema, (self.step + 1) / (self.step + 10))
        with torch.no_grad():
            torch._foreach_copy_(self.live, self.masters)
            torch._foreach_lerp_(self.ema, self.masters, 1 - decay)
        self.step += 1

    def train(
        self,
        bank: Bank,
        save: Path | None = None,
        every: float = 60.0,
        watch: Callable[[float], None] | None = None,
        watched: tuple[float, ...] = (),
    ) -> None:
        """Train until the steps are done or the time is up.

        Args:
            bank: the training clips.
            save: file for the state of the run.
            every: seconds between saves.
            watch: called with the completed share of the run at each of the `watched` shares, while the UNet contains
                the moving average. The time it takes does not count.
            watched: shares of the run.
        """
        plan = self.plan
        left = sorted(watched)
        began = time.monotonic() - self.elapsed
        saved = shown = self.elapsed
        seen: list[torch.Tensor] = []
        while True:
            self.elapsed = time.monotonic() - began
            done = max(
                self.step / plan.steps if plan.steps else 0.0, self.elapsed / plan.seconds if plan.seconds else 0.0
            )
            if done >= 1:
                break
            rise, fall = (self.step + 1) / plan.warmup, 0.5 * (1 + math.cos(math.pi * done))
            self.descend(bank, plan.rate * self.slower * min(rise, fall))
            seen.append(self.errors.clone())
            if self.elapsed - shown > 10 or len(seen) >= 500:
                self._show(seen, done)
                shown = self.elapsed
                if not torch.stack(seen).isfinite().all():
                    self._go_back(save)
                seen.clear()
            if save and self.elapsed - saved > every:
                self.save(save)
                saved = self.elapsed
            if watch and left and done >= left[0]:
                left = [share for share in left if share > done]
                stopped = time.monotonic()
                with self.averaged():
                    watch(done)
                began += time.monotonic() - stopped
        if seen:
            self._show(seen, 1.0)
        if save:
            self.save(save)

    def _go_back(self, save: Path | None) -> None:
        """Restore the last saved state and halve the learning rate, because the run has diverged."""
        if save is None or not save.exists():
            raise FloatingPointError("The errors are no longer finite: lower the learning rate.")
        elapsed = self.elapsed
        self.resume(save)
        self.elapsed = elapsed
        self.slower /= 2
        _log.warning("Diverged. Continuing from step %d with %g times the learning rate.", self.step, self.slower)

    def _show(self, seen: list[torch.Tensor], done: float) -> None:
        """Log the mean error by band of noise levels."""
        mean = torch.stack(seen).mean(0)
        bands = [f"{part.mean().item():.4f}" for part in mean.chunk(min(_BANDS, len(mean)))]
        _log.info("step %d (%.0f %%, %.0f s) errors from high noise to low: %s", self.step, 100 * done,
                  self.elapsed, " ".join(bands))  # fmt: skip

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Context in which the UNet contains the moving average."""
        with torch.no_grad():
            torch._foreach_copy_(self.live, self.ema)
        self.unet.eval()
        yield
        with torch.no_grad():
            torch._foreach_copy_(self.live, self.masters)
        self.unet.train()

    def average(self) -> dict[str, torch.Tensor]:
        """The moving average by parameter name, in float32 on the CPU."""
        return {name: value.detach().cpu() for name, value in zip(self.names, self.ema, strict=True)}

    def state(self) -> dict[str, Any]:
        """State of the run."""
        return {
            "masters": self.masters, "ema": self.ema, "step": self.step, "elapsed": self.elapsed,
            "recycled": self.recycled, "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }  # fmt: skip

    def save(self, target: Path) -> None:
        """Save the state of the run."""
        state = self.state()
        target.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, f"{target}.part")
        os.replace(f"{target}.part", target)

    def resume(self, source: Path) -> bool:
        """Restore a saved state. Returns False if there is none."""
        if not source.exists():
            return False
        self.restore(torch.load(source, map_location=self.device))
        _log.info("resumed at step %d", self.step)
        return True

    def restore(self, state: dict[str, Any]) -> None:
        """Restore a state of the run."""
        for optimizer, stored in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(stored)
        self.step, self.elapsed = state["step"], state["elapsed"]
        self.recycled.copy_(state["recycled"])
        with torch.no_grad():
            torch._foreach_copy_(self.masters, state["masters"])
            torch._foreach_copy_(self.ema, state["ema"])
            torch._foreach_copy_(self.live, self.masters)


def _matrix(master: torch.Tensor) -> torch.Tensor:
    """A view of a weight and its gradient with two dimensions, which is what Muon takes."""
    view = master.flatten(1)
    view.grad = master.grad.flatten(1)
    return view


def _optimizers(
    masters: Sequence[torch.Tensor], groups: Sequence[tuple[Sequence[torch.nn.Parameter], float]], plan: Plan
) -> list[torch.optim.Optimizer]:
    """The optimizers of the master weights. A group's factor on the learning rate is its `multiple`.

    Muon updates all weights of groups without a factor that have two dimensions or more. Its updates are scaled to
    the size of AdamW's.
    """
    left = iter(masters)
    adamw, muon = [], []
    for group, multiple in groups:
        own = [next(left) for _ in group]
        matrices = [master for master in own if plan.muon and multiple == 1 and master.ndim > 1]
        others = [master for master in own if not any(master is matrix for matrix in matrices)]
        muon.append({"params": [_matrix(master) for master in matrices], "multiple": multiple})
        adamw.append({"params": others, "multiple": multiple})
    found: list[torch.optim.Optimizer] = []
    adamw, muon = ([group for group in groups if group["params"]] for groups in (adamw, muon))
    if adamw:
        found.append(torch.optim.AdamW(adamw, lr=plan.rate, weight_decay=0.0, betas=(0.9, 0.99), fused=True))
    if muon:
        found.append(torch.optim.Muon(muon, lr=plan.rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"))
    return found
