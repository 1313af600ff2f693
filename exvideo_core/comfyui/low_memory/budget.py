"""How much memory one chunk may use: the limit that every chunked layer asks for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

MEGABYTE = 2**20

#: The limit on a CPU, and outside of `limit_chunks`. Smaller chunks spend their time on call overhead, larger ones on
#: memory that the system has to clear.
DEFAULT_CHUNK_BYTES = 32 * MEGABYTE
# A context variable, because ComfyUI runs the clones of a model on several GPUs in one thread each.
_limit: ContextVar[int] = ContextVar("exvideo_chunk_bytes", default=DEFAULT_CHUNK_BYTES)


@contextmanager
def limit_chunks(chunk_bytes: int) -> Iterator[None]:
    """Limit the widest intermediate tensor of a chunk to `chunk_bytes` within this context."""
    token = _limit.set(chunk_bytes)
    try:
        yield
    finally:
        _limit.reset(token)


def chunk_ranges(total: int, bytes_each: int) -> list[tuple[int, int]]:
    """Split `total` items into chunks of nearly equal size that stay within the limit, with at least one item each.

    Args:
        total: number of frames, or of rows over all frames.
        bytes_each: size of the widest intermediate tensor of one item.

    Returns:
        (start, end) of each chunk, in order.
    """
    items_per_chunk = max(_limit.get() // max(bytes_each, 1), 1)
    count = max(-(-total // items_per_chunk), 1)
    return [(total * i // count, total * (i + 1) // count) for i in range(count)]
