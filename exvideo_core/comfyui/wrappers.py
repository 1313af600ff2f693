"""How a clone of an SVD model gets its wrappers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import comfy.model_base
from comfy.patcher_extension import WrappersMP

#: The order of our own wrappers of a sampling: what is for all of it stays outside of the windows, which sample each by
#: itself, and everybody else's wrappers stay inside of them.
_AROUND_WINDOWS = ("exvideo", "exvideo_preview", "exvideo_recording", "exvideo_windows")

if TYPE_CHECKING:
    import torch
    from comfy.model_patcher import ModelPatcher

    #: The host's callback of a step: step, clean prediction, noisy sample, number of steps. None if it has none.
    StepCallback = Callable[[int, torch.Tensor, torch.Tensor, int], None] | None


def check_svd(model: ModelPatcher) -> None:
    """Raises ValueError where a model is of another kind."""
    if not isinstance(model.model, comfy.model_base.SVD_img2vid):
        raise ValueError(
            f"The model is a {type(model.model).__name__}, and this is for Stable Video Diffusion (SVD). "
            "Load an SVD checkpoint, such as svd_xt."
        )


def wrap(patched: ModelPatcher, kind: str, key: str, wrapper: Callable[..., Any], first: bool = True) -> None:
    """Set or replace a wrapper. First means outermost: what comes after then sees one window of a clip."""
    patched.remove_wrappers_with_key(kind, key)
    patched.add_wrapper_with_key(kind, key, wrapper)
    wrappers = patched.wrappers[kind]
    front = [each for each in _AROUND_WINDOWS if each in wrappers] if kind == WrappersMP.OUTER_SAMPLE else []
    if first and not front:
        front = [key]
    patched.wrappers[kind] = {each: wrappers[each] for each in dict.fromkeys([*front, *wrappers])}


def around_callback(
    patched: ModelPatcher,
    key: str,
    around: Callable[[ModelPatcher, torch.Tensor, StepCallback, Callable[[StepCallback], torch.Tensor]], torch.Tensor],
) -> None:
    """Put something in the place of the host's callback of a step, for the time of a sampler's run.

    Args:
        around: takes the model that is sampled, the noise, the callback, and what runs the sampler with a callback;
            gives the result.
    """

    def wrapper(
        executor: Any,  # noqa: ANN401 - the host's
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

    wrap(patched, WrappersMP.OUTER_SAMPLE, key, wrapper)


def room_for(frames: int | None = None, height: int | None = None, width: int | None = None) -> Callable[..., Any]:
    """Room is made for the largest call that there will be, not for the whole clip."""
    limits = (frames, None, height, width)

    def wrapper(executor: Any, model: ModelPatcher, noise_shape: Sequence[int], *rest: Any, **named: Any) -> Any:  # noqa: ANN401
        largest = [size if most is None else min(size, most) for size, most in zip(noise_shape, limits, strict=True)]
        return executor(model, largest, *rest, **named)

    return wrapper
