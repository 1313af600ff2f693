"""Sampling in windows of frames, as wrappers of the host's sampling.

The host's own context windows do not do for SVD: they pass a window its frames, but 0.33 adds a frame by default and
crashes, every window sees the first picture as its own first frame, and none goes on from what another has finished.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import comfy.model_base
import comfy.model_management
import comfy.sampler_helpers
import torch
from comfy.patcher_extension import WrappersMP

from ...choices import Anchor, Fuse
from ...video.windows import fuse_weights, hold_weights, recurring_noise, spans
from ..apply.patch import applied_extension
from ..wrappers import check_svd, room_for, wrap
from .conditions import Cond, Controls, Frames, Parts
from .preview import play_while_sampling

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher
    from comfy.samplers import CFGGuider

    from ..wrappers import StepCallback

_KEY = "exvideo_windows"
#: Noise levels from which on a sample counts as finished, in multiples of the model's smallest.
_FINISHED = 1.5


@dataclass(frozen=True)
class Windows:
    """How a clip longer than a window is sampled.

    *sequential* finishes one window after the other: each is held to the frames that are finished already, as an
    inpainting is to its surroundings. The other fuses denoise all windows at every step and average them.

    Attributes:
        frames: of a window.
        overlap: frames that neighbours share.
        anchor: the picture that windows past the first are conditioned on as their first frame.
        recurring_noise: later windows begin from the noise of earlier ones, shuffled.
        closed_loop: the clip's end goes over into its beginning.
    """

    frames: int = 128
    overlap: int = 32
    fuse: Fuse = "sequential"
    anchor: Anchor = "window start"
    recurring_noise: bool = False
    closed_loop: bool = False

    def of(self, total: int) -> list[list[int]]:
        return spans(total, self.frames, self.overlap, self.closed_loop)


def with_windows(model: ModelPatcher, windows: Windows) -> ModelPatcher:
    """A clone of an SVD model that samples clips longer than a window in windows.

    A clip that is no longer than a window is sampled as without, unless it is to be a closed loop.

    Raises:
        ValueError: the model is no SVD, or its extension has no positions for so many frames.
    """
    check_svd(model)
    applied = applied_extension(model)
    if applied is not None and applied.positions == "trained" and windows.frames > applied.frames:
        raise ValueError(
            f"window_frames is {windows.frames}, but the extension '{applied.name}' was trained for {applied.frames} "
            f"frames. Lower window_frames to {applied.frames}, or set positions of ExVideo Apply to 'stretch'."
        )
    spans(2 * windows.frames, windows.frames, windows.overlap)  # says so if the two do not go together
    patched = model.clone()
    parts = Parts()
    if windows.fuse != "sequential":
        wrap(patched, WrappersMP.CALC_COND_BATCH, _KEY, _fused(windows, parts))
    else:
        patched.remove_wrappers_with_key(WrappersMP.CALC_COND_BATCH, _KEY)
    wrap(patched, WrappersMP.OUTER_SAMPLE, _KEY, _sampled(windows, parts))
    wrap(patched, WrappersMP.PREPARE_SAMPLING, _KEY, room_for(frames=windows.frames))
    play_while_sampling(patched)
    return patched


def _fused(settings: Windows, parts: Parts) -> Callable[..., list[torch.Tensor]]:
    """All windows at every step, averaged."""

    def wrapper(
        executor: Any,  # noqa: ANN401 - the host's
        model: comfy.model_base.BaseModel,
        conds: list[list[Cond] | None],
        x: torch.Tensor,
        timestep: torch.Tensor,
        options: dict[str, Any],
    ) -> list[torch.Tensor]:
        windows = settings.of(len(x))
        if len(windows) == 1:
            return executor(model, conds, x, timestep, options)
        sums = [torch.zeros_like(x) for _ in conds]
        shares = x.new_zeros(len(x), 1, 1, 1)
        for number, frames in enumerate(windows):
            comfy.model_management.throw_exception_if_processing_interrupted()
            part = Frames(tuple(frames), len(x))
            given = []
            for cond, total in zip(conds, sums, strict=True):
                own = None if cond is None else [part.cut(each, parts.controls) for each in cond]
                if own is not None and number > 0:
                    start = total[frames[:1]] / shares[frames[:1]]
                    own = _anchored(own, settings.anchor, model.process_latent_out(start))
                given.append(own)
            own_options = parts.caches.of(options, part, model.model_sampling)
            made = executor(model, given, x[frames], part.rows(timestep), own_options)
            weights = fuse_weights(windows, number, settings.fuse).to(x).view(-1, 1, 1, 1)
            for total, result in zip(sums, made, strict=True):
                total[frames] += result * weights
            shares[frames] += weights
        return [total.div_(shares) for total in sums]

    return wrapper


def _sampled(settings: Windows, parts: Parts) -> Callable[..., torch.Tensor]:
    """The whole sampling: its noise, and, if sequential, a sampling for each window.

    Windows are cut where the host begins a sampling, outside of all that others keep for one: caches, LoRA schedules
    and samplers begin anew in each.
    """

    def wrapper(
        executor: Any,  # noqa: ANN401 - the host's
        noise: torch.Tensor,
        latent_image: torch.Tensor,
        sampler: Any,  # noqa: ANN401
        sigmas: torch.Tensor,
        denoise_mask: torch.Tensor | None = None,
        callback: StepCallback = None,
        disable_pbar: bool = False,
        seed: int | None = None,
        **rest: Any,  # noqa: ANN401 - the host's latent_shapes
    ) -> torch.Tensor:
        guider: CFGGuider = executor.class_obj
        windows = settings.of(len(noise))
        if settings.recurring_noise and len(windows) > 1:
            noise = recurring_noise(noise, len(windows[0]), settings.overlap, seed or 0)
        if settings.fuse != "sequential" or len(windows) == 1:
            try:
                return executor(
                    noise, latent_image, sampler, sigmas, denoise_mask, callback, disable_pbar, seed, **rest
                )
            finally:
                parts.clear()
        _check_ends(guider, sigmas)
        clip = latent_image.to("cpu", torch.float32, copy=True)
        mask = _mask_of_pictures(denoise_mask, clip)
        finished: set[int] = set()
        made = clip
        for number, frames in enumerate(windows):
            free = hold_weights(windows, number).to(mask).view(-1, 1, 1, 1)
            if not free.any():  # where a loop closes, windows before it may have left nothing to make
                continue
            part = Frames(tuple(frames), len(clip))
            start = clip[frames[:1]] if number else None
            given = _noise_of(guider, noise, latent_image, clip, sigmas, part, finished)
            held = None
            if number or denoise_mask is not None:
                held = torch.minimum(mask[frames], free).to(guider.model_patcher.load_device)
            report = _reported(guider, callback, clip, frames, number, len(windows))
            if "latent_shapes" in rest:
                rest["latent_shapes"] = [clip[frames].shape]
            # Samplers that add noise draw other noise in every window.
            own_seed = None if seed is None else (seed + number) % 2**64
            with _guided(guider, part, settings.anchor, start):
                made = executor(given, clip[frames], sampler, sigmas, held, report, disable_pbar, own_seed, **rest)
            clip[frames] = made.to(clip)
            finished.update(frames)
        return clip.to(made)

    return wrapper


def _mask_of_pictures(denoise_mask: torch.Tensor | None, clip: torch.Tensor) -> torch.Tensor:
    """What may be changed of each frame, as the host understands masks of any size [T, 1, H, W]."""
    if denoise_mask is None:
        return torch.ones_like(clip[:, :1])
    if denoise_mask.shape != clip.shape:  # 0.3.64 hands it over as it was given
        denoise_mask = comfy.sampler_helpers.prepare_mask(denoise_mask, clip.shape, clip.device)
    return denoise_mask[:, :1].to(clip)


def _check_ends(guider: CFGGuider, sigmas: torch.Tensor) -> None:
    """Raises ValueError where a schedule stops before its end."""
    sampling = guider.model_patcher.get_model_object("model_sampling")
    if float(sigmas[-1]) > _FINISHED * float(sampling.sigma_min):
        raise ValueError(
            "ExVideo Windows with fuse 'sequential' finishes one window before it begins the next, but this sampler's "
            f"schedule stops at a noise level (sigma) of {float(sigmas[-1]):.3g}. Let it run to the end (end_at_step "
            "10000, return_with_leftover_noise 'disable', all sigmas), or set fuse to 'pyramid', which can be split "
            "between samplers."
        )


def _noise_of(
    guider: CFGGuider,
    noise: torch.Tensor,
    latent_image: torch.Tensor,
    clip: torch.Tensor,
    sigmas: torch.Tensor,
    part: Frames,
    finished: set[int],
) -> torch.Tensor:
    """The noise that a window begins with, beside the clip as it is by then.

    Where a sampler goes on from another, its noise is zero and the latents hold what the other has left. Frames that a
    window before has finished are clean by now: the noise that they had is what their latents have lost.
    """
    frames = list(part.chosen)
    given = noise[frames]
    if given.any() or not finished.intersection(frames):
        return given
    sampling, first = guider.model_patcher.get_model_object("model_sampling"), float(sigmas[0])
    # As the host scales a sampling's first noise (`Sampler.max_denoise`, `EPS.noise_scaling`).
    whole = first > float(sampling.sigma_max) * (1 - 1e-5)
    scale = math.hypot(1.0, first) if whole else first
    scaled = guider.model_patcher.model.process_latent_in
    lost = scaled(latent_image.to(clip)[frames]) - scaled(clip[frames])
    return (lost / scale).to(given)


def _reported(
    guider: CFGGuider, callback: StepCallback, clip: torch.Tensor, frames: list[int], number: int, count: int
) -> StepCallback:
    """The host's callback for a step of a window: the clip as it is by then, and the steps of all windows."""
    if callback is None:
        return None
    before = guider.model_patcher.model.process_latent_in(clip)

    def report(step: int, denoised: torch.Tensor, x: torch.Tensor, steps: int) -> None:
        whole, noisy = before.to(denoised, copy=True), before.to(x, copy=True)
        whole[frames], noisy[frames] = denoised, x
        callback(number * steps + step, whole, noisy, count * steps)

    return report


@contextmanager
def _guided(guider: CFGGuider, part: Frames, anchor: Anchor, start: torch.Tensor | None) -> Iterator[None]:
    """The guider's conditions and options, cut to a window.

    Args:
        start: the window's first frame, where it is past the first window.
    """
    conds, options, controls = guider.conds, guider.model_options, Controls()
    own = {name: [part.cut(cond, controls) for cond in group] for name, group in conds.items()}
    if start is not None:
        own = {name: _anchored(group, anchor, start) for name, group in own.items()}
    guider.conds, guider.model_options = own, _options_in_place(options, part)
    try:
        yield
    finally:
        guider.conds, guider.model_options = conds, options


def _options_in_place(options: dict[str, Any], part: Frames) -> dict[str, Any]:
    """Options of a window, whose guidance function sees the clip's length: a scale that runs over it stays in place."""
    guide = options.get("sampler_cfg_function")
    if guide is None:
        return options
    frames = list(part.chosen)

    def in_place(args: dict[str, Any]) -> torch.Tensor:
        def spread(value: Any) -> Any:  # noqa: ANN401
            if not torch.is_tensor(value) or value.ndim == 0 or len(value) != len(frames):
                return value
            # Frames outside hold what the window's first does: the noise level is the same for all.
            whole = value[:1].repeat(part.total, *(1 for _ in value.shape[1:]))
            whole[frames] = value
            return whole

        return guide({name: spread(value) for name, value in args.items()})[frames]

    return {**options, "sampler_cfg_function": in_place}


def _anchored(conds: list[Cond], anchor: Anchor, start: torch.Tensor) -> list[Cond]:
    """Conditions of a window past the first, with the picture that it is to begin with.

    Those without a picture, as the negative one is, stay so.

    Args:
        conds: before the host has encoded them, or after it.
        start: the window's first frame, in the VAE's scale [1, C, H, W].
    """
    if anchor == "first picture":
        return conds
    wanted = torch.zeros_like(start) if anchor == "none" else start
    anchored = []
    for cond in conds:
        given, encoded = cond.get("concat_latent_image"), cond.get("model_conds", {}).get("c_concat")
        if given is not None and given.any():
            cond = {**cond, "concat_latent_image": wanted.to(given)}
        if encoded is not None and encoded.cond.any():
            picture = encoded._copy_with(wanted.to(encoded.cond).expand_as(encoded.cond))
            cond = {**cond, "model_conds": {**cond["model_conds"], "c_concat": picture}}
        anchored.append(cond)
    return anchored
