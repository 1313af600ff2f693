"""Adds the pack's wrappers to a clone of a model, in the right order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from comfy.patcher_extension import WrappersMP

#: The order of our own wrappers of a sampling. They stay outside of the windows, which run one sampling each;
#: everyone else's wrappers stay inside.
_OUTSIDE_WINDOWS = ("exvideo", "exvideo_few_steps", "exvideo_preview", "exvideo_recording", "exvideo_windows")

if TYPE_CHECKING:
    import torch
    from comfy.model_patcher import ModelPatcher

    #: ComfyUI's step callback: step, x0 prediction, noisy sample, number of steps. None if there is none.
    StepCallback = Callable[[int, torch.Tensor, torch.Tensor, int], None] | None


def set_wrapper(patched: ModelPatcher, kind: str, key: str, wrapper: Callable[..., Any], first: bool = True) -> None:
    """Add or replace a wrapper.

    Args:
        kind: of `WrappersMP`.
        first: put it outermost, so that every other wrapper sees one window of a video.
    """
    patched.remove_wrappers_with_key(kind, key)
    patched.add_wrapper_with_key(kind, key, wrapper)
    wrappers = patched.wrappers[kind]
    front = [each for each in _OUTSIDE_WINDOWS if each in wrappers] if kind == WrappersMP.OUTER_SAMPLE else []
    if first and not front:
        front = [key]
    patched.wrappers[kind] = {each: wrappers[each] for each in dict.fromkeys([*front, *wrappers])}


def wrap_callback(
    patched: ModelPatcher,
    key: str,
    around: Callable[[ModelPatcher, torch.Tensor, StepCallback, Callable[[StepCallback], torch.Tensor]], torch.Tensor],
) -> None:
    """Replace the step callback while a sampler runs.

    Args:
        around: called with the sampled model, the noise [T, C, H, W], the callback, and a function that runs the
            sampler with a given callback; returns the result [T, C, H, W].
    """

    def wrapper(
        executor: Any,  # noqa: ANN401 - ComfyUI's
        noise: torch.Tensor,
        latent_image: torch.Tensor,
        sampler: Any,  # noqa: ANN401
        sigmas: torch.Tensor,
        denoise_mask: torch.Tensor | None = None,
        callback: StepCallback = None,
        *rest: Any,  # noqa: ANN401
        **named: Any,  # noqa: ANN401
    ) -> torch.Tensor:
        def run(called: StepCallback) -> torch.Tensor:
            return executor(noise, latent_image, sampler, sigmas, denoise_mask, called, *rest, **named)

        return around(executor.class_obj.model_patcher, noise, callback, run)

    set_wrapper(patched, WrappersMP.OUTER_SAMPLE, key, wrapper)


def limit_estimate(
    frames: int | None = None, height: int | None = None, width: int | None = None
) -> Callable[..., Any]:
    """A PREPARE_SAMPLING wrapper by which memory is reserved for one window or tile instead of the whole video.

    Args:
        frames: maximum number of frames T of a call (default: all).
        height, width: maximum size of a call, in latent pixels (default: all).
    """
    limits = (frames, None, height, width)

    def wrapper(executor: Any, model: ModelPatcher, noise_shape: Sequence[int], *rest: Any, **named: Any) -> Any:  # noqa: ANN401
        largest = [size if limit is None else min(size, limit) for size, limit in zip(noise_shape, limits, strict=True)]
        return executor(model, largest, *rest, **named)

    return wrapper
