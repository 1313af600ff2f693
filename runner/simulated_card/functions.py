"""What is done with tensors of simulated cards: PyTorch functions, run on the tensors in RAM behind them.

Each function runs whole, as one kernel of a card does: only what it returns takes memory of the card.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from . import devices, hollow, remembered, special
from .counting import counted
from .memory import machine
from .tensor import CardTensor, reveal

Function = Callable[..., Any]


class _CardMode(TorchFunctionMode):
    """Sees the functions that no tensor of a card takes part in, such as `torch.zeros(..., device="cuda")`."""

    def __torch_function__(
        self, func: Function, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:  # noqa: ANN401 - PyTorch's protocol
        return call(func, types, args, kwargs or {})


@contextlib.contextmanager
def active() -> Iterator[None]:
    """Within it, this thread computes on the simulated cards. PyTorch's modes belong to one thread each."""
    with _CardMode():
        yield


def activate_threads(first: Callable[[], None] | None = None) -> None:
    """Make threads that start from here on compute on the simulated cards.

    Args:
        first: called at the beginning of each.
    """
    run = threading.Thread.run

    def run_on_cards(thread: threading.Thread) -> None:
        if first is not None:
            first()
        with active():
            run(thread)

    threading.Thread.run = run_on_cards  # type: ignore[method-assign]


def call(func: Function, types: Sequence[type], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:  # noqa: ANN401
    """Run a function, an operator or a property of PyTorch that may involve cards.

    Raises:
        DeviceMismatch: tensors of different devices meet in it.
        torch.OutOfMemoryError: a card has no room for the result.
    """
    if not all(issubclass(kind, torch.Tensor) for kind in types):
        return NotImplemented
    name = name_of(func)
    if name == "__get__":
        return special.get_property(func, args[0]) if isinstance(args[0], CardTensor) else func(*args)
    if name == "__set__":
        return special.set_property(func, *args)
    handler = special.HANDLERS.get(name)
    if handler is not None:
        result = handler(func, args, kwargs)
        if result is not NotImplemented:
            return result
    return operate(func, name, args, kwargs)


def name_of(func: Function) -> str:
    """`add` for `torch.add`, `Tensor.add` and `torch.ops.aten.add.Tensor` alike."""
    schema = getattr(func, "_schema", None)
    return schema.name.split("::")[1] if schema is not None else getattr(func, "__name__", str(func))


def operate(func: Function, name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:  # noqa: ANN401
    """Run a function on the tensors in RAM, and give its results to the card."""
    tensors = list(_tensors((*args, *kwargs.values())))
    cards = [tensor for tensor in tensors if isinstance(tensor, CardTensor)]
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
    if index is not None and "generator" in kwargs and kwargs["generator"] is not None:
        raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
    if device is None:
        devices.check(name, args, tensors)
    elif torch.device(device).type == "cuda":
        kwargs["device"] = "meta" if machine.hollow else "cpu"
    if machine.hollow:
        found = hollow.without_numbers(func, name, args, kwargs)
        if found is not NotImplemented:
            return _give(found, index, {})
    inner_args, inner_kwargs = _unwrapped(args), _unwrapped(kwargs)
    with counted():
        run = remembered.run if machine.hollow else _run
        result = run(func, name, inner_args, inner_kwargs)
    return _give(result, index, {id(tensor.inner): tensor for tensor in cards})


def _run(func: Function, name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:  # noqa: ANN401
    return func(*args, **kwargs)


def _tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            # A list of numbers, as torch.tensor takes it, may be long.
            if value and not isinstance(value[0], int | float | str):
                yield from _tensors(value)
            elif isinstance(value, tuple):
                yield from _tensors(item for item in value if isinstance(item, torch.Tensor | list | tuple))
        elif isinstance(value, dict):
            yield from _tensors(value.values())


def _unwrapped(value: Any) -> Any:  # noqa: ANN401
    if isinstance(value, CardTensor):
        return reveal(value)
    if machine.hollow and isinstance(value, torch.Tensor) and value.dim():
        return value.to("meta")
    if type(value) in (list, tuple):
        return type(value)(_unwrapped(item) for item in value)
    if type(value) is dict:
        return {key: _unwrapped(item) for key, item in value.items()}
    return value


def _give(value: Any, index: int | None, given: dict[int, CardTensor]) -> Any:  # noqa: ANN401
    """Results as tensors of a card. What came in, as `out` or to be changed in place, goes out as the same object."""

    def give(item: Any) -> Any:  # noqa: ANN401
        if not isinstance(item, torch.Tensor) or isinstance(item, CardTensor) or index is None:
            return item
        return given[id(item)] if id(item) in given else CardTensor(item, index)

    return give(value) if isinstance(value, torch.Tensor) else tree_map(give, value) if _holds(value) else value


def _holds(value: Any) -> bool:  # noqa: ANN401
    return isinstance(value, list | tuple | dict) and not isinstance(value, torch.Size)
