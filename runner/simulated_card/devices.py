"""Checks that the tensors of an operator are on the same device, as CUDA does."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch

from .memory import machine
from .tensor import CardTensor, DeviceMismatch

#: Functions that use only the shape or dtype of another tensor.
_SHAPE_ONLY = {"view_as", "expand_as", "reshape_as", "is_same_size", "result_type", "broadcast_tensors"}
#: Functions that take a list of tensors, in which even scalars must be on the same device.
_JOINING = {"cat", "concat", "concatenate", "stack", "hstack", "vstack", "dstack"}
_INDEXING = {"__getitem__", "__setitem__", "index_put_", "index_put", "_unsafe_index", "_index_put_impl_", "index"}

_current = threading.local()


def current() -> int:
    """Index of this thread's current card, to which `cuda` refers."""
    return getattr(_current, "index", 0)


def set_current(index: int) -> None:
    """Set this thread's current card."""
    _current.index = index


def card_index(device: torch.device | str | int | None) -> int | None:
    """Index of a card, or None if the device is not a card.

    Raises:
        RuntimeError: there is no card with this index.
    """
    if device is None:
        return current()
    if isinstance(device, int):
        index = device
    else:
        device = torch.device(device)
        if device.type != "cuda":
            return None
        index = current() if device.index is None else device.index
    if not 0 <= index < len(machine.cards):
        raise RuntimeError("CUDA error: invalid device ordinal")
    return index


def check(name: str, args: Sequence[Any], tensors: Sequence[torch.Tensor]) -> None:
    """Reject what CUDA rejects. Scalars in RAM may be combined with tensors on a card.

    Args:
        name: of the operator.
        args: its positional arguments.
        tensors: all its tensors.

    Raises:
        DeviceMismatch: the tensors are on different devices.
    """
    if name in _SHAPE_ONLY:
        return
    if name in _INDEXING:
        _check_indexing(name, args)
        return
    cards = [tensor.index for tensor in tensors if isinstance(tensor, CardTensor)]
    in_place = name.endswith("_") and not name.endswith("__") or name.startswith("__i")
    for position, tensor in enumerate(tensors):
        if isinstance(tensor, CardTensor):
            if tensor.index != cards[0]:
                raise mismatch(name, tensors)
        elif tensor.dim() or name in _JOINING or (in_place and position == 0):
            raise mismatch(name, tensors)


def _check_indexing(name: str, args: Sequence[Any]) -> None:
    tensor, indices = args[0], args[1]
    own = tensor.index if isinstance(tensor, CardTensor) else None
    lists = [index for index in (indices if isinstance(indices, list | tuple) else [indices]) if _is_list(index)]
    for index in lists:
        if isinstance(index, CardTensor) and index.index != own:
            place = "cpu" if own is None else f"cuda:{own}"
            raise DeviceMismatch(
                f"indices should be either on cpu or on the same device as the indexed tensor ({place}), in {name}: "
                f"an index is on cuda:{index.index}"
            )
    if name in ("__setitem__", "index_put_", "index_put", "_index_put_impl_"):
        value = args[2]
        copied = name == "__setitem__" and not lists  # values of slices may be on any device
        scalar = not isinstance(value, CardTensor) and not (isinstance(value, torch.Tensor) and value.dim())
        if not copied and not scalar and device_name(value) != device_name(tensor):
            raise mismatch(name, [tensor, value])


def _is_list(index: Any) -> bool:  # noqa: ANN401
    """Whether an index is a tensor that can select several elements."""
    return isinstance(index, torch.Tensor) and (index.dim() > 0 or index.dtype in (torch.bool, torch.uint8))


def device_name(tensor: torch.Tensor) -> str:
    """Device of a tensor, such as "cuda:0" or "cpu"."""
    return f"cuda:{tensor.index}" if isinstance(tensor, CardTensor) else str(tensor.device)


def mismatch(name: str, tensors: Sequence[torch.Tensor]) -> DeviceMismatch:
    """The error for an operator whose tensors are on different devices."""
    places = " and ".join(dict.fromkeys(device_name(tensor) for tensor in tensors))
    shapes = ", ".join(f"{device_name(tensor)} {list(tensor.shape)}" for tensor in tensors)
    return DeviceMismatch(
        f"Expected all tensors to be on the same device, but found at least two devices, {places}! "
        f"(in {name}, of {shapes}; simulated card)"
    )
