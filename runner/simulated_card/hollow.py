"""Hollow cards: functions that need the data of tensors without data.

All data reads as zeros, and writes are ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .counting import counted
from .tensor import CardTensor

_NUMBERS: dict[str, Any] = {
    "__float__": 0.0,
    "__int__": 0,
    "__index__": 0,
    "__bool__": False,
    "equal": True,
    "allclose": True,
}


def without_numbers(func: Callable[..., Any], name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:  # noqa: ANN401
    """Result of a function that the meta device does not support, or NotImplemented if it does.

    Tensors in the result are on the meta device, or in RAM if they are copied there.
    """
    if name in _NUMBERS:
        return _NUMBERS[name]
    if name in ("item", "_local_scalar_dense"):
        return torch.zeros((), dtype=args[0].dtype).item()
    if name == "__setitem__":
        return None
    if name == "nonzero":
        return torch.empty((1, args[0].dim()), dtype=torch.int64, device="meta")
    if name == "_to_copy":
        return blank(args[0], kwargs.get("dtype"), kwargs.get("device"))
    if name == "scaled_dot_product_attention":
        return _attention(args, kwargs)
    if name.endswith("_like") and kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cpu":
        return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
    return NotImplemented


def blank(tensor: torch.Tensor, dtype: torch.dtype | None, device: torch.device | str | None = "meta") -> torch.Tensor:
    """A tensor of the same shape: zeros in RAM, or without data on the meta device."""
    inner = tensor.inner if isinstance(tensor, CardTensor) else tensor
    make = torch.zeros_like if torch.device(device or "meta").type == "cpu" else torch.empty_like
    return make(inner, dtype=dtype or inner.dtype, device=device or "meta")


def _attention(args: Sequence[Any], kwargs: dict[str, Any]) -> Any:  # noqa: ANN401
    """Attention as a single operator without a score matrix, as on cards."""
    if len(args) != 3 or kwargs.get("attn_mask") is not None or kwargs.get("enable_gqa"):
        return NotImplemented
    query, key, value = (tensor.inner for tensor in args)
    causal = bool(kwargs.get("is_causal"))
    flash = torch.ops.aten._scaled_dot_product_flash_attention
    return counted(flash, (query, key, value, 0.0, causal), {})[0]
