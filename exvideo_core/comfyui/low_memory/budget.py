"""How much is computed at once: the one place that layers ask before they cut their work into chunks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

MEGABYTE = 2**20


@dataclass(frozen=True)
class Budget:
    """Of one call of the UNet.

    Attributes:
        chunk_bytes: what the widest intermediate of a chunk may take. A chunk is never less than one frame, or one
            row of pixels over all frames.
    """

    chunk_bytes: int


#: What a layer works with on a CPU, and outside of any `use`. Smaller chunks spend their time on small calls, larger
#: ones on memory that the system has to clear.
DEFAULT = Budget(32 * MEGABYTE)
# A context variable, because the host runs the clones of a model on several GPUs in threads of their own.
_current: ContextVar[Budget] = ContextVar("exvideo_budget", default=DEFAULT)


@contextmanager
def use(budget: Budget) -> Iterator[None]:
    """Everything within works with `budget`."""
    token = _current.set(budget)
    try:
        yield
    finally:
        _current.reset(token)


def spans(total: int, bytes_each: int) -> list[tuple[int, int]]:
    """Cut `total` items into chunks of nearly equal size that stay within the budget.

    Args:
        bytes_each: widest intermediate of one item.

    Returns:
        (start, end) of each chunk, in order.
    """
    most = max(_current.get().chunk_bytes // max(bytes_each, 1), 1)
    count = max(-(-total // most), 1)
    return [(total * i // count, total * (i + 1) // count) for i in range(count)]
