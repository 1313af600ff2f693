"""Lets a dispatch mode observe the operators that run on simulated cards."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

_counter: contextvars.ContextVar[TorchDispatchMode | None] = contextvars.ContextVar("counter", default=None)


@contextlib.contextmanager
def counting(mode: TorchDispatchMode) -> Iterator[None]:
    """Run this thread's operators on cards under a dispatch mode, which is entered for each operator.

    The mode sees plain tensors, in RAM or on the meta device if cards are hollow. It does not see copies between a card
    and RAM, which `memory().to_card` and `.to_host` count.
    """
    token = _counter.set(mode)
    try:
        yield
    finally:
        _counter.reset(token)


def counted(func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:  # noqa: ANN401
    """Call an operator, under the counting mode if there is one."""
    mode = _counter.get()
    if mode is None:
        return func(*args, **kwargs)
    with mode:
        return func(*args, **kwargs)


def is_counted() -> bool:
    """Whether a counting mode is active in this context."""
    return _counter.get() is not None
