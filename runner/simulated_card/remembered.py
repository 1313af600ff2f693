"""Hollow cards: caches the shapes of results, since PyTorch takes about a millisecond to infer them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

#: Functions whose result depends only on the shapes of tensors and on plain arguments.
_CACHEABLE = {
    "add", "sub", "mul", "div", "addcmul", "square", "mean", "sum", "rsqrt", "gelu", "silu", "sigmoid", "softmax",
    "lerp", "linear", "conv1d", "conv2d", "conv3d", "group_norm", "layer_norm", "interpolate", "cat", "clone",
    "contiguous", "flatten", "reshape", "repeat_interleave",
}  # fmt: skip
#: Functions that modify and return their first argument.
_IN_PLACE = {"add_", "sub_", "mul_", "div_", "square_", "clamp_", "fill_", "zero_"}

_cache: dict[Any, tuple[torch.Size, tuple[int, ...], torch.dtype]] = {}


def run(func: Callable[..., Any], name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:  # noqa: ANN401
    """Run a function of tensors on the meta device, or take the shape of its result from the cache."""
    if name not in _CACHEABLE and name not in _IN_PLACE:
        return func(*args, **kwargs)
    key = (name, _key(args), _key(tuple(sorted(kwargs.items()))), torch.get_default_dtype())
    try:
        cached = _cache.get(key)
    except TypeError:  # an argument is not hashable
        return func(*args, **kwargs)
    out = kwargs.get("out", args[0] if name in _IN_PLACE or kwargs.get("inplace") else None)
    if cached is not None:
        shape, strides, dtype = cached
        return torch.empty_strided(shape, strides, dtype=dtype, device="meta") if out is None else out
    result = func(*args, **kwargs)
    if result is out or isinstance(result, torch.Tensor) and _is_new(result, args):
        _cache[key] = (result.shape, result.stride(), result.dtype)
    return result


def _is_new(result: torch.Tensor, args: Sequence[Any]) -> bool:
    """Whether a result is not a view of an argument."""
    storage = result.untyped_storage()._cdata
    return all(tensor.untyped_storage()._cdata != storage for tensor in _tensors(args))


def _tensors(values: Sequence[Any]) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _key(value: Any) -> Any:  # noqa: ANN401
    if isinstance(value, torch.Tensor):
        return value.shape, value.stride(), value.dtype, value.device.type
    if isinstance(value, list | tuple):
        return tuple(_key(item) for item in value)
    return type(value), value
