"""How a clone of an SVD model gets its wrappers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import comfy.model_base

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher


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
    if first:
        others = patched.wrappers[kind]
        patched.wrappers[kind] = {key: others.pop(key), **others}


def room_for(frames: int | None = None, height: int | None = None, width: int | None = None) -> Callable[..., Any]:
    """Room is made for the largest call that there will be, not for the whole clip."""
    limits = (frames, None, height, width)

    def wrapper(executor: Any, model: ModelPatcher, noise_shape: Sequence[int], *rest: Any, **named: Any) -> Any:  # noqa: ANN401
        largest = [size if most is None else min(size, most) for size, most in zip(noise_shape, limits, strict=True)]
        return executor(model, largest, *rest, **named)

    return wrapper
