"""Measures the memory of a CUDA card."""

from __future__ import annotations

import threading
from types import TracebackType

import torch

GIB = 2**30
_INTERVAL = 0.02  # seconds between samples of the driver's counter


class CudaMeter:
    """Measures peaks of PyTorch's allocator and, in a thread, of the whole card as reported by its driver.

    Dynamic VRAM keeps weights outside of PyTorch's allocator, so that only the driver counts them. Memory that was in
    use before the meter was created is not included.
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
        """Reset the peak."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        self._peak = _in_use()

    def read(self) -> dict[str, float]:
        """Peaks since `begin` in GiB: tensors, PyTorch's reserved memory, and the whole card."""
        return {
            "peak_gib": (torch.cuda.max_memory_allocated() - self._allocated) / GIB,
            "reserved_gib": torch.cuda.max_memory_reserved() / GIB,
            "card_gib": (self._peak - self._held) / GIB,
        }

    def copied(self) -> int:
        """Always 0, since the driver does not count copies."""
        return 0

    def _watch(self) -> None:
        while not self._ended.wait(_INTERVAL):
            self._peak = max(self._peak, _in_use())


def _in_use() -> int:
    free, total = torch.cuda.mem_get_info()
    return total - free
