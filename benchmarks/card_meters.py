"""Reads the memory of a CUDA card."""

from __future__ import annotations

import threading
from types import TracebackType

import torch

GIB = 2**30
_REST = 0.02


class CudaMeter:
    """Peaks of PyTorch's allocator, and of the whole card as its driver tells it, in a thread of its own.

    Dynamic VRAM holds weights outside of PyTorch's allocator: only the driver sees them. What the card held when the
    meter was made is not counted.
    """

    def __init__(self) -> None:
        torch.cuda.synchronize()
        self._held = _in_use()
        self._allocated = torch.cuda.memory_allocated()
        self._peak = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> CudaMeter:
        self.begin()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def begin(self) -> None:
        """Forget the peak so far."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        self._peak = _in_use()

    def read(self) -> dict[str, float]:
        """GiB at the peak since `begin`: of tensors, of what PyTorch has taken for them, and of the card."""
        return {
            "peak_gib": (torch.cuda.max_memory_allocated() - self._allocated) / GIB,
            "reserved_gib": torch.cuda.max_memory_reserved() / GIB,
            "card_gib": (self._peak - self._held) / GIB,
        }

    def copied(self) -> int:
        return 0  # the driver does not tell

    def _watch(self) -> None:
        while not self._ended.wait(_REST):
            self._peak = max(self._peak, _in_use())


def _in_use() -> int:
    free, total = torch.cuda.mem_get_info()
    return total - free
