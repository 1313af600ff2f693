"""Pinned host memory for tensors that have no room on the device, counted among ComfyUI's own."""

from __future__ import annotations

import functools
from collections.abc import Callable

import comfy.model_management
import torch


class HostBuffers:
    """Buffers in host memory, reused by every call: the n-th `take` of each call gets the n-th buffer.

    PyTorch's own pinned memory would be rounded up to powers of two, stay cached when it is no longer needed, and be
    unknown to ComfyUI's accounting.

    Args:
        pin: page-locks a tensor's memory; False where that is not possible.
        unpin: undoes it, once the copies that are still running are done.
    """

    def __init__(self, pin: Callable[[torch.Tensor], bool], unpin: Callable[[torch.Tensor], object]) -> None:
        self._pin, self._unpin = pin, unpin
        self._buffers: list[tuple[torch.Tensor, bool]] = []
        self._used = 0

    def begin(self) -> None:
        """Begin a call: the next `take` returns the first buffer again."""
        self._used = 0

    def take(self, like: torch.Tensor) -> torch.Tensor:
        """The next buffer, as an empty tensor with the shape, dtype and memory layout of `like`."""
        index, self._used = self._used, self._used + 1
        if index == len(self._buffers):
            self._buffers.append((torch.empty(0, dtype=torch.uint8), False))
        buffer, _ = self._buffers[index]
        if buffer.nbytes != like.nbytes:
            self._free(index)
            buffer = torch.empty(like.nbytes, dtype=torch.uint8)
            self._buffers[index] = buffer, self._pin(buffer)
        layout = torch.empty_like(like, device="meta")
        return buffer.view(like.dtype).as_strided(layout.shape, layout.stride())

    def release(self) -> None:
        """Free all buffers."""
        for index in range(len(self._buffers)):
            self._free(index)
        self._buffers.clear()

    def _free(self, index: int) -> None:
        buffer, pinned = self._buffers[index]
        if pinned:
            self._unpin(buffer)
        self._buffers[index] = torch.empty(0, dtype=torch.uint8), False

    def __del__(self) -> None:
        self.release()


def host_buffers(device: torch.device) -> HostBuffers:
    """Buffers for copies from and to a device."""
    return HostBuffers(pin, functools.partial(unpin, device))


def pin(buffer: torch.Tensor) -> bool:
    """Page-lock a tensor's memory in place. False where there is no GPU, or no more memory to pin."""
    if not torch.cuda.is_available() or buffer.nbytes == 0:
        return False
    pin_memory = getattr(comfy.model_management, "pin_memory", None)  # 0.3.64 has none
    if pin_memory is not None:
        return bool(pin_memory(buffer))
    return torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), buffer.nbytes, 1) == 0


def unpin(device: torch.device, buffer: torch.Tensor) -> None:
    """Undo `pin`, once the device's running copies are done."""
    torch.cuda.synchronize(device)
    unpin_memory = getattr(comfy.model_management, "unpin_memory", None)
    if unpin_memory is not None:
        unpin_memory(buffer)
    else:
        torch.cuda.cudart().cudaHostUnregister(buffer.data_ptr())
