"""Counts what cards compute: a dispatch mode of the caller's sees each operator that runs on them."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

_counter: contextvars.ContextVar[TorchDispatchMode | None] = contextvars.ContextVar("counter", default=None)


@contextlib.contextmanager
def counting(mode: TorchDispatchMode) -> Iterator[None]:
    """Within it, this thread's operators on cards run under a dispatch mode, which is entered for each of them.

    The mode sees plain tensors: in RAM, or on the meta device if cards are hollow. Copies between a card and RAM are
    not shown to it; `memory().to_card` and `.to_host` count them.
    """
    token = _counter.set(mode)
    try:
        yield
    finally:
        _counter.reset(token)


def counted(func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:  # noqa: ANN401
    """Call an operator of a card."""
    mode = _counter.get()
    if mode is None:
        return func(*args, **kwargs)
    with mode:
        return func(*args, **kwargs)


def is_counted() -> bool:
    return _counter.get() is not None
