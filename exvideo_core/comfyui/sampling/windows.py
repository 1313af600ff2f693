"""Sampling in overlapping windows of frames, as wrappers of ComfyUI's sampling.

ComfyUI's own context windows do not suit SVD: 0.33 adds a frame to each window by default and crashes, every window
takes the first image for its own first frame, and no window continues what another one has finished.
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
from ...video.windows import continuation_mask, freenoise, fuse_weights, split_windows
from ..model import applied_extension, check_svd
from ..wrappers import limit_estimate, set_wrapper
from .conditions import Condition, SamplingState, SlicedControls, Window
from .preview import add_preview

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher
    from comfy.samplers import CFGGuider

    from ..wrappers import StepCallback

_KEY = "exvideo_windows"
#: Noise levels below which a sample counts as finished, in multiples of the model's smallest.
_FINISHED = 1.5
#: Maps a frame in the VAE's scale [1, C, H, W] to its image embedding [1, 1, D].
Embed = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class WindowSettings:
    """How a video longer than a window is sampled.

    *sequential* finishes one window after the other, each holding on to the frames that are already finished, as
    inpainting does to the surroundings of a mask. The other fuses denoise all windows at every step and average them.

    Attributes:
        frames: per window.
        overlap: frames that neighboring windows share.
        anchor: the image that every window but the first is conditioned on as its first frame.
        freenoise: windows reuse the noise of earlier windows, shuffled.
        closed_loop: the video's end leads back to its beginning.
    """

    frames: int
    overlap: int
    fuse: Fuse = "sequential"
    anchor: Anchor = "window start"
    freenoise: bool = False
    closed_loop: bool = False

    def split(self, total: int) -> list[list[int]]:
        """The frames of each window of a video of `total` frames."""
        return split_windows(total, self.frames, self.overlap, self.closed_loop)


def with_windows(model: ModelPatcher, settings: WindowSettings, embed: Embed | None = None) -> ModelPatcher:
    """A clone of an SVD model that samples videos longer than a window in windows.

    A video that is not longer than a window is sampled normally, unless it is a closed loop.

    Args:
        model: the model.
        settings: size and kind of the windows.
        embed: gives sequential windows that are conditioned on their own first frame that frame's embedding. Without
            it, they have the one of the video's first frame, in which things may be elsewhere.

    Raises:
        ValueError: the model is not an SVD model, or its extension has no positions for so many frames.
    """
    check_svd(model)
    applied = applied_extension(model)
    if applied is not None and applied.positions == "trained" and settings.frames > applied.frames:
        raise ValueError(
            f"window_frames is {settings.frames}, but the extension '{applied.name}' was trained for {applied.frames} "
            f"frames. Lower window_frames to {applied.frames}, or set positions of ExVideo Apply to 'stretch'."
        )
    split_windows(2 * settings.frames, settings.frames, settings.overlap)  # raises if the two do not fit together
    patched = model.clone()
    state = SamplingState()
    if settings.fuse != "sequential":
        set_wrapper(patched, WrappersMP.CALC_COND_BATCH, _KEY, _average_windows(settings, state))
    else:
        patched.remove_wrappers_with_key(WrappersMP.CALC_COND_BATCH, _KEY)
    set_wrapper(patched, WrappersMP.OUTER_SAMPLE, _KEY, _sample(settings, state, embed))
    set_wrapper(patched, WrappersMP.PREPARE_SAMPLING, _KEY, limit_estimate(frames=settings.frames))
    add_preview(patched)
    return patched


def _average_windows(settings: WindowSettings, state: SamplingState) -> Callable[..., list[torch.Tensor]]:
    """CALC_COND_BATCH wrapper: denoises all windows of a call and averages them where they overlap."""

    def wrapper(
        executor: Any,  # noqa: ANN401 - ComfyUI's
        model: comfy.model_base.BaseModel,
        conds: list[list[Condition] | None],
        x: torch.Tensor,
        timestep: torch.Tensor,
        options: dict[str, Any],
    ) -> list[torch.Tensor]:
        windows = settings.split(len(x))
        if len(windows) == 1:
            return executor(model, conds, x, timestep, options)
        sums = [torch.zeros_like(x) for _ in conds]
        weight_sum = x.new_zeros(len(x), 1, 1, 1)
        for number, frames in enumerate(windows):
            comfy.model_management.throw_exception_if_processing_interrupted()
            window = Window(tuple(frames), len(x))
            sliced = []
            for group, total in zip(conds, sums, strict=True):
                own = None if group is None else [window.slice_condition(cond, state.controls) for cond in group]
                if own is not None and number > 0:
                    first_frame = total[frames[:1]] / weight_sum[frames[:1]]
                    own = _set_anchor(own, settings.anchor, model.process_latent_out(first_frame))
                sliced.append(own)
            own_options = state.easy_caches.options(options, window, model.model_sampling)
            results = executor(model, sliced, x[frames], window.select(timestep), own_options)
            weights = fuse_weights(windows, number, settings.fuse).to(x).view(-1, 1, 1, 1)
            for total, result in zip(sums, results, strict=True):
                total[frames] += result * weights
            weight_sum[frames] += weights
        return [total.div_(weight_sum) for total in sums]

    return wrapper


def _sample(settings: WindowSettings, state: SamplingState, embed: Embed | None) -> Callable[..., torch.Tensor]:
    """OUTER_SAMPLE wrapper: prepares the noise and, if sequential, runs one sampling per window.

    Windows are sliced where ComfyUI begins a sampling, outside of everything that other nodes keep for one: caches,
    LoRA schedules and samplers start from scratch in each window.
    """

    def wrapper(
        executor: Any,  # noqa: ANN401 - ComfyUI's
        noise: torch.Tensor,
        latent_image: torch.Tensor,
        sampler: Any,  # noqa: ANN401
        sigmas: torch.Tensor,
        denoise_mask: torch.Tensor | None = None,
        callback: StepCallback = None,
        disable_pbar: bool = False,
        seed: int | None = None,
        **rest: Any,  # noqa: ANN401 - ComfyUI's latent_shapes
    ) -> torch.Tensor:
        guider: CFGGuider = executor.class_obj
        windows = settings.split(len(noise))
        if settings.freenoise and len(windows) > 1:
            noise = freenoise(noise, len(windows[0]), settings.overlap, seed or 0)
        if settings.fuse != "sequential" or len(windows) == 1:
            try:
                return executor(
                    noise, latent_image, sampler, sigmas, denoise_mask, callback, disable_pbar, seed, **rest
                )
            finally:
                state.clear()
        _check_schedule_ends(guider, sigmas)
        video = latent_image.to("cpu", torch.float32, copy=True)
        mask = _frame_mask(denoise_mask, video)
        finished: set[int] = set()
        result = video
        for number, frames in enumerate(windows):
            own_mask = continuation_mask(windows, number).to(mask).view(-1, 1, 1, 1)
            if not own_mask.any():  # where a loop closes, earlier windows may have left nothing to denoise
                continue
            window = Window(tuple(frames), len(video))
            first_frame = video[frames[:1]] if number else None
            own_noise = _window_noise(guider, noise, latent_image, video, sigmas, window, finished)
            if number or denoise_mask is not None:
                own_mask = torch.minimum(mask[frames], own_mask).to(guider.model_patcher.load_device)
            else:
                own_mask = None
            own_callback = _window_callback(guider, callback, video, frames, number, len(windows))
            if "latent_shapes" in rest:
                rest["latent_shapes"] = [video[frames].shape]
            # Samplers that add noise draw different noise in every window.
            own_seed = None if seed is None else (seed + number) % 2**64
            embedding = None
            if embed is not None and first_frame is not None and settings.anchor == "window start":
                embedding = embed(first_frame)  # before the window's sampling, which loads the model again
            with _window_conditions(guider, window, settings.anchor, first_frame, embedding):
                result = executor(
                    own_noise, video[frames], sampler, sigmas, own_mask, own_callback, disable_pbar, own_seed, **rest
                )
            video[frames] = result.to(video)
            finished.update(frames)
        return video.to(result)

    return wrapper


def _frame_mask(denoise_mask: torch.Tensor | None, video: torch.Tensor) -> torch.Tensor:
    """The noise mask of each frame [T, 1, H, W], from a mask of any size that ComfyUI accepts."""
    if denoise_mask is None:
        return torch.ones_like(video[:, :1])
    if denoise_mask.shape != video.shape:  # ComfyUI 0.3.64 passes it on unprocessed
        denoise_mask = comfy.sampler_helpers.prepare_mask(denoise_mask, video.shape, video.device)
    return denoise_mask[:, :1].to(video)


def _check_schedule_ends(guider: CFGGuider, sigmas: torch.Tensor) -> None:
    """Check that a schedule runs down to the smallest noise level.

    Raises:
        ValueError: it stops above.
    """
    sampling = guider.model_patcher.get_model_object("model_sampling")
    if float(sigmas[-1]) > _FINISHED * float(sampling.sigma_min):
        raise ValueError(
            "ExVideo Windows with fuse 'sequential' finishes one window before it begins the next, but this sampler's "
            f"schedule stops at a noise level (sigma) of {float(sigmas[-1]):.3g}. Let it run to the end (end_at_step "
            "10000, return_with_leftover_noise 'disable', all sigmas), or set fuse to 'pyramid', which can be split "
            "between samplers."
        )


def _window_noise(
    guider: CFGGuider,
    noise: torch.Tensor,
    latent_image: torch.Tensor,
    video: torch.Tensor,
    sigmas: torch.Tensor,
    window: Window,
    finished: set[int],
) -> torch.Tensor:
    """The initial noise of a window, to be added to the current state of the video.

    If a sampler continues with another one's leftover noise, its own noise is zero and the latents contain that noise.
    Frames that an earlier window has finished are clean by now: their noise is the difference.

    Returns:
        [frames of the window, C, H, W].
    """
    frames = list(window.frames)
    own = noise[frames]
    if own.any() or not finished.intersection(frames):
        return own
    sampling, first = guider.model_patcher.get_model_object("model_sampling"), float(sigmas[0])
    # As ComfyUI scales a sampling's first noise (`Sampler.max_denoise`, `EPS.noise_scaling`).
    max_denoise = first > float(sampling.sigma_max) * (1 - 1e-5)
    scale = math.hypot(1.0, first) if max_denoise else first
    process_latent_in = guider.model_patcher.model.process_latent_in
    lost = process_latent_in(latent_image.to(video)[frames]) - process_latent_in(video[frames])
    return (lost / scale).to(own)


def _window_callback(
    guider: CFGGuider, callback: StepCallback, video: torch.Tensor, frames: list[int], number: int, count: int
) -> StepCallback:
    """Step callback of a window, which passes the whole video and the steps of all windows to ComfyUI's callback."""
    if callback is None:
        return None
    before = guider.model_patcher.model.process_latent_in(video)

    def report(step: int, x0: torch.Tensor, x: torch.Tensor, steps: int) -> None:
        whole_x0, whole_x = before.to(x0, copy=True), before.to(x, copy=True)
        whole_x0[frames], whole_x[frames] = x0, x
        callback(number * steps + step, whole_x0, whole_x, count * steps)

    return report


@contextmanager
def _window_conditions(
    guider: CFGGuider,
    window: Window,
    anchor: Anchor,
    first_frame: torch.Tensor | None,
    embedding: torch.Tensor | None,
) -> Iterator[None]:
    """Give the guider the conditions and options of a window.

    Args:
        first_frame: of the window, in the VAE's scale [1, C, H, W]; None for the first window.
        embedding: of that frame [1, 1, D]; None keeps the conditions' own.
    """
    conds, options, controls = guider.conds, guider.model_options, SlicedControls()
    own = {name: [window.slice_condition(cond, controls) for cond in group] for name, group in conds.items()}
    if first_frame is not None:
        own = {name: _set_anchor(group, anchor, first_frame) for name, group in own.items()}
    if embedding is not None:
        own = {name: _set_embedding(group, embedding) for name, group in own.items()}
    guider.conds, guider.model_options = own, _full_length_guidance(options, window)
    try:
        yield
    finally:
        guider.conds, guider.model_options = conds, options


def _full_length_guidance(options: dict[str, Any], window: Window) -> dict[str, Any]:
    """Options whose guidance function sees a whole video: a scale that varies over its frames stays in place."""
    guidance = options.get("sampler_cfg_function")
    if guidance is None:
        return options
    frames = list(window.frames)

    def full_length(args: dict[str, Any]) -> torch.Tensor:
        def expand(value: Any) -> Any:  # noqa: ANN401
            if not torch.is_tensor(value) or value.ndim == 0 or len(value) != len(frames):
                return value
            # Frames outside of the window repeat its first one: the noise level is the same for all.
            whole = value[:1].repeat(window.total, *(1 for _ in value.shape[1:]))
            whole[frames] = value
            return whole

        return guidance({name: expand(value) for name, value in args.items()})[frames]

    return {**options, "sampler_cfg_function": full_length}


def _set_anchor(conds: list[Condition], anchor: Anchor, first_frame: torch.Tensor) -> list[Condition]:
    """Conditions of a window past the first, with the image that it begins with.

    Conditions without an image, such as the negative one, stay without.

    Args:
        conds: before or after ComfyUI has encoded them.
        first_frame: of the window, in the VAE's scale [1, C, H, W].
    """
    if anchor == "first picture":
        return conds
    image = torch.zeros_like(first_frame) if anchor == "none" else first_frame
    anchored = []
    for cond in conds:
        original, encoded = cond.get("concat_latent_image"), cond.get("model_conds", {}).get("c_concat")
        if original is not None and original.any():
            cond = {**cond, "concat_latent_image": image.to(original)}
        if encoded is not None and encoded.cond.any():
            replaced = encoded._copy_with(image.to(encoded.cond).expand_as(encoded.cond))
            cond = {**cond, "model_conds": {**cond["model_conds"], "c_concat": replaced}}
        anchored.append(cond)
    return anchored


def _set_embedding(conds: list[Condition], embedding: torch.Tensor) -> list[Condition]:
    """Conditions with another image embedding [1, 1, D], before ComfyUI has encoded them.

    Those without one, such as the negative one, stay without.
    """
    changed = []
    for cond in conds:
        own = cond.get("cross_attn")
        if own is not None and own.shape[1:] == embedding.shape[1:] and own.any():
            cond = {**cond, "cross_attn": embedding.to(own)}
        changed.append(cond)
    return changed
