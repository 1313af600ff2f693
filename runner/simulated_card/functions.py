"""Runs PyTorch functions of simulated cards on their tensors in RAM.

Each function runs as a whole, like a single kernel of a card: only its result uses memory of the card.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import MethodWrapperType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from . import devices, hollow, remembered, special
from .counting import counted, is_counted
from .memory import machine
from .tensor import CardTensor, reveal

Function = Callable[..., Any]


class _CardMode(TorchFunctionMode):
    """Handles functions without tensors of a card as arguments, such as `torch.zeros(..., device="cuda")`."""

    def __torch_function__(
        self, func: Function, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:  # noqa: ANN401 - PyTorch's protocol
        return call(func, types, args, kwargs or {})


@contextlib.contextmanager
def active() -> Iterator[None]:
    """A context in which this thread uses the simulated cards. PyTorch's function modes are local to a thread."""
    with _CardMode():
        yield


def activate_threads(first: Callable[[], None] | None = None) -> None:
    """Make all threads that start from now on use the simulated cards.

    Args:
        first: called at the start of each thread.
    """
    run = threading.Thread.run

    def run_on_cards(thread: threading.Thread) -> None:
        if first is not None:
            first()
        with active():
            run(thread)

    threading.Thread.run = run_on_cards  # type: ignore[method-assign]


def call(func: Function, types: Sequence[type], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:  # noqa: ANN401
    """Run a function, operator or property of PyTorch that may involve cards.

    Raises:
        DeviceMismatch: the tensors are on different devices.
        torch.OutOfMemoryError: the result does not fit on the card.
    """
    for kind in types:
        if kind is not CardTensor and not issubclass(kind, torch.Tensor):
            return NotImplemented
    if type(func) is MethodWrapperType:  # of a property
        if func.__name__ == "__get__":
            return special.get_property(func, args[0]) if type(args[0]) is CardTensor else func(*args)
        if func.__name__ == "__set__":
            return special.set_property(func, *args)
    name = name_of(func)
    handler = special.HANDLERS.get(name)
    if handler is not None:
        result = handler(func, args, kwargs)
        if result is not NotImplemented:
            return result
    return operate(func, name, args, kwargs)


def name_of(func: Function) -> str:
    """`add` for `torch.add`, `Tensor.add` and `torch.ops.aten.add.Tensor` alike."""
    if isinstance(func, torch._ops.OpOverload):
        return func._schema.name.split("::")[1]
    return getattr(func, "__name__", str(func))


def operate(func: Function, name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:  # noqa: ANN401
    """Run a function on the tensors in RAM, and move its results to the card."""
    tensors: list[torch.Tensor] = []
    _collect(args, tensors)
    if kwargs:
        _collect(kwargs.values(), tensors)
    cards = [tensor for tensor in tensors if type(tensor) is CardTensor]
    index = cards[0].index if cards else None
    device = kwargs.get("device")
    if device is not None:
        index = devices.card_index(device)
    if not cards and index is None and not kwargs.get("pin_memory"):
        return func(*args, **kwargs)
    kwargs = dict(kwargs)
    if kwargs.get("pin_memory"):
        if index is not None:
            raise RuntimeError(f"Only dense CPU tensors can be pinned ({name} on cuda:{index}).")
        del kwargs["pin_memory"]
        return special.pin(operate(func, name, args, kwargs))
    if index is not None and kwargs.get("generator") is not None:
        raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
    if device is None:
        devices.check(name, args, tensors)
    elif torch.device(device).type == "cuda":
        kwargs["device"] = "meta" if machine.hollow else "cpu"
    if machine.hollow:
        found = hollow.without_numbers(func, name, args, kwargs)
        if found is not NotImplemented:
            return _to_card(found, index, {})
    inner_args, inner_kwargs = [_unwrapped(value) for value in args], _unwrapped(kwargs) if kwargs else kwargs
    if machine.hollow and not is_counted():
        result = remembered.run(func, name, inner_args, inner_kwargs)
    else:
        result = counted(func, inner_args, inner_kwargs)
    return _to_card(result, index, {id(tensor.inner): tensor for tensor in cards})


def _collect(values: Iterable[Any], found: list[torch.Tensor]) -> None:
    """Append all tensors in `values` and nested containers to `found`."""
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, tuple):
            _collect(value, found)
        elif isinstance(value, list):
            # Lists of numbers, as for torch.tensor, can be long.
            if value and not isinstance(value[0], int | float | str):
                _collect(value, found)
        elif isinstance(value, dict):
            _collect(value.values(), found)


def _unwrapped(value: Any) -> Any:  # noqa: ANN401
    kind = type(value)
    if kind is CardTensor:
        return reveal(value)
    if kind is list or kind is tuple:
        return kind([_unwrapped(item) for item in value])
    if kind is dict:
        return {key: _unwrapped(item) for key, item in value.items()}
    if machine.hollow and isinstance(value, torch.Tensor) and value.dim():
        return value.to("meta")
    return value


def _to_card(value: Any, index: int | None, inputs: dict[int, CardTensor]) -> Any:  # noqa: ANN401
    """Wrap results as tensors of a card. Inputs that are returned (in place, or as `out`) keep their identity."""

    def wrap(item: Any) -> Any:  # noqa: ANN401
        if not isinstance(item, torch.Tensor) or type(item) is CardTensor or index is None:
            return item
        return inputs[id(item)] if id(item) in inputs else CardTensor(item, index)

    if isinstance(value, torch.Tensor):
        return wrap(value)
    return tree_map(wrap, value) if isinstance(value, list | tuple | dict) and type(value) is not torch.Size else value
