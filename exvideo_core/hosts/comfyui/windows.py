"""Sampling in windows of frames, as wrappers of the host's sampling.

The host's own context windows do not do for SVD: they pass a window its frames, but 0.33 adds a frame by default and
crashes, every window sees the first picture as its own first frame, and none goes on from what another has finished.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import comfy.conds
import comfy.model_base
import comfy.model_management
import torch
from comfy.patcher_extension import WrappersMP

from ...choices import Anchor, Fuse
from ...windows import fuse_weights, hold_weights, recurring_noise, spans
from .patch import applied_extension
from .preview import play_while_sampling
from .wrapping import check_svd, room_for, wrap

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher
    from comfy.samplers import CFGGuider

_KEY = "exvideo_windows"
Conds = list[dict[str, Any]]


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
    if windows.fuse != "sequential":
        wrap(patched, WrappersMP.CALC_COND_BATCH, _KEY, _fused(windows))
    else:
        patched.remove_wrappers_with_key(WrappersMP.CALC_COND_BATCH, _KEY)
    wrap(patched, WrappersMP.SAMPLER_SAMPLE, _KEY, _sampled(windows))
    wrap(patched, WrappersMP.PREPARE_SAMPLING, _KEY, room_for(frames=windows.frames))
    play_while_sampling(patched)
    return patched


def _fused(settings: Windows) -> Callable[..., list[torch.Tensor]]:
    """All windows at every step, averaged."""

    def wrapper(
        executor: Any,  # noqa: ANN401 - the host's
        model: comfy.model_base.BaseModel,
        conds: list[Conds | None],
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
            parts = []
            for cond, total in zip(conds, sums, strict=True):
                part = None if cond is None else [_of_frames(each, frames, len(x)) for each in cond]
                if part is not None and number > 0:
                    start = total[frames[:1]] / shares[frames[:1]]
                    part = _anchored(part, settings.anchor, model.process_latent_out(start))
                parts.append(part)
            made = executor(model, parts, x[frames], _rows(timestep, frames, len(x)), options)
            weights = fuse_weights(windows, number, settings.fuse).to(x).view(-1, 1, 1, 1)
            for total, result in zip(sums, made, strict=True):
                total[frames] += result * weights
            shares[frames] += weights
        return [total.div_(shares) for total in sums]

    return wrapper


def _sampled(settings: Windows) -> Callable[..., torch.Tensor]:
    """The whole sampling: its noise, and, if sequential, a sampling for each window."""

    def wrapper(
        executor: Any,  # noqa: ANN401 - the host's
        guider: CFGGuider,
        sigmas: torch.Tensor,
        extra_args: dict[str, Any],
        callback: Callable[..., None] | None,
        noise: torch.Tensor,
        latent_image: torch.Tensor | None = None,
        denoise_mask: torch.Tensor | None = None,
        disable_pbar: bool = False,
    ) -> torch.Tensor:
        windows = settings.of(len(noise))
        if settings.recurring_noise and len(windows) > 1:
            noise = recurring_noise(noise, len(windows[0]), settings.overlap, extra_args.get("seed") or 0)
        if settings.fuse != "sequential" or len(windows) == 1:
            return executor(guider, sigmas, extra_args, callback, noise, latent_image, denoise_mask, disable_pbar)
        clip = torch.zeros_like(noise) if latent_image is None else latent_image.clone()
        mask = torch.ones_like(clip) if denoise_mask is None else denoise_mask.clone()
        for number, frames in enumerate(windows):
            free = hold_weights(windows, number).to(mask).view(-1, 1, 1, 1)
            if not free.any():  # where a loop closes, windows before it may have left nothing to make
                continue
            anchor = guider.inner_model.process_latent_out(clip[frames[:1]]) if number else None
            options = _options_in_place(extra_args["model_options"], frames, len(clip))
            arguments = {**extra_args, "model_options": options}
            if arguments.get("seed") is not None:
                # Samplers that add noise draw other noise in every window.
                arguments["seed"] = (arguments["seed"] + number) % 2**64
            report = _reported(callback, clip, frames, number, len(windows))
            held = None if denoise_mask is None and number == 0 else torch.minimum(mask[frames], free)
            with _conds_of(guider, frames, len(clip), settings.anchor, anchor):
                made = executor(guider, sigmas, arguments, report, noise[frames], clip[frames], held, disable_pbar)
            clip[frames] = made.to(clip)
        return clip

    return wrapper


def _reported(
    callback: Callable[..., None] | None, clip: torch.Tensor, frames: list[int], number: int, count: int
) -> Callable[..., None] | None:
    """The host's callback for a step of a window: the clip as it is by then, and the steps of all windows."""
    if callback is None:
        return None

    def report(step: int, denoised: torch.Tensor, x: torch.Tensor, steps: int) -> None:
        whole, noisy = clip.clone(), clip.clone()
        whole[frames], noisy[frames] = denoised.to(clip), x.to(clip)
        callback(number * steps + step, whole, noisy, count * steps)

    return report


def _options_in_place(options: dict[str, Any], frames: list[int], total: int) -> dict[str, Any]:
    """Options of a window, whose guidance function sees the clip's length: a scale that runs over it stays in place."""
    guide = options.get("sampler_cfg_function")
    if guide is None:
        return options

    def in_place(args: dict[str, Any]) -> torch.Tensor:
        def spread(value: Any) -> Any:  # noqa: ANN401
            if not torch.is_tensor(value) or value.ndim == 0 or len(value) != len(frames):
                return value
            whole = value.new_zeros(total, *value.shape[1:])
            whole[frames] = value
            return whole

        return guide({name: spread(value) for name, value in args.items()})[frames]

    return {**options, "sampler_cfg_function": in_place}


@contextmanager
def _conds_of(
    guider: CFGGuider, frames: list[int], total: int, anchor: Anchor, start: torch.Tensor | None
) -> Iterator[None]:
    """The guider's conditioning, cut to a window."""
    whole = guider.conds
    parts = {name: [_of_frames(cond, frames, total) for cond in conds] for name, conds in whole.items()}
    if start is not None:
        parts = {name: _anchored(conds, anchor, start) for name, conds in parts.items()}
    guider.conds = parts
    try:
        yield
    finally:
        guider.conds = whole


def _of_frames(cond: dict[str, Any], frames: list[int], total: int) -> dict[str, Any]:
    """A condition of some frames of a clip."""
    model_conds = {
        name: comfy.conds.CONDConstant(len(frames)) if name == "num_video_frames" else _cut(value, frames, total)
        for name, value in cond.get("model_conds", {}).items()
    }
    return {**{name: _rows(value, frames, total) for name, value in cond.items()}, "model_conds": model_conds}


def _cut(value: Any, frames: list[int], total: int) -> Any:  # noqa: ANN401 - any of comfy.conds
    tensor = getattr(value, "cond", None)
    return value._copy_with(_rows(tensor, frames, total)) if torch.is_tensor(tensor) else value


def _rows(value: Any, frames: list[int], total: int) -> Any:  # noqa: ANN401
    """A tensor's rows of some frames, if it has a row for each."""
    return value[frames] if torch.is_tensor(value) and value.ndim > 0 and len(value) == total else value


def _anchored(conds: Conds, anchor: Anchor, start: torch.Tensor) -> Conds:
    """Conditions of a window past the first, with the picture that it is to begin with.

    Those without a picture, as the negative one is, stay so.

    Args:
        start: the window's first frame, in the VAE's scale [1, C, H, W].
    """
    if anchor == "first picture":
        return conds
    anchored = []
    for cond in conds:
        picture = cond["model_conds"].get("c_concat")
        if picture is not None and picture.cond.any():
            wanted = torch.zeros_like(start) if anchor == "none" else start
            given = wanted.to(picture.cond).expand_as(picture.cond)
            cond = {**cond, "model_conds": {**cond["model_conds"], "c_concat": picture._copy_with(given)}}
        anchored.append(cond)
    return anchored
