"""Replaces `comfy_aimdo`'s buffers and file reading, which transfer weights from files to cards.

Requires a POSIX system.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from typing import Any, Protocol

import torch

from .memory import MIB, machine
from .tensor import CardTensor, allocation_of

CHUNK = 16 * MIB


class _File(Protocol):
    def fileno(self) -> int: ...


class VRAMBuffer:
    """A transfer buffer on a card that grows in steps of 16 MiB, like `comfy_aimdo.vram_buffer.VRAMBuffer`."""

    _bases = iter(range(1 << 62, 1 << 63, 1 << 44))

    def __init__(self, max_size: int, device: int) -> None:
        self.device = device
        self.max_size = int(max_size)
        self.base_addr = next(self._bases)
        self._memory = machine.cards[device]
        self._allocated = 0
        reserved = min(self.max_size, self._memory.card.total)
        with torch._C.DisableTorchFunction():
            self._raw = (
                torch.empty(reserved, dtype=torch.uint8, device="meta") if machine.hollow else _reserve(reserved)
            )
        self._allocation = allocation_of(self._raw.untyped_storage(), None)  # counted in `get`, as it grows

    def size(self) -> int:
        return self._allocated

    def get(self, size: int, offset: int = 0) -> tuple[VRAMBuffer, int, int]:
        """Location of `size` bytes at `offset`; grows the buffer if needed.

        Raises:
            RuntimeError: the buffer does not fit on the card.
        """
        needed = int(size) + int(offset)
        if needed > self._allocated:
            grown = -(-needed // CHUNK) * CHUNK
            try:
                self._memory.allocate(grown - self._allocated)
            except torch.OutOfMemoryError as error:
                raise RuntimeError(f"VRAM grow failed: {needed} bytes") from error
            self._allocated = grown
        return self, self.base_addr + int(offset), int(size)

    def tensor(self, address: int, size: int) -> CardTensor:
        offset = address - self.base_addr
        with torch._C.DisableTorchFunction():
            return CardTensor(self._raw[offset : offset + size], self.device, self._allocation)

    def __del__(self) -> None:
        if hasattr(self, "_allocation"):
            self._allocation.valid = False
            self._memory.release(self._allocated)


class HostBuffer:
    """A buffer in RAM that grows in place, like `comfy_aimdo.host_buffer.HostBuffer`."""

    def __init__(self, size: int, prewarm: int = 0, max_grow_size: int = 0, mark_cold: bool = True) -> None:
        self.size = 0
        self._reserved = max(int(size), int(max_grow_size)) + max(int(prewarm), 0)
        self._raw: torch.Tensor | None = None
        self._registered: list[int] = []
        if size:
            self.extend(size)

    def tensor(self) -> torch.Tensor:
        """Contents as uint8 [size]."""
        with torch._C.DisableTorchFunction():
            return self._buffer()[: self.size]

    def _buffer(self) -> torch.Tensor:
        if self._raw is None:
            self._raw = _reserve(max(self._reserved, 1))
        return self._raw

    def get_raw_address(self) -> int:
        with torch._C.DisableTorchFunction():
            return self._buffer().data_ptr()

    def extend(self, size: int, reallocate: bool = False, register: bool = True) -> int:
        """Grow the buffer by `size` bytes, and return the address of the new bytes.

        Raises:
            RuntimeError: the reserved size is exceeded.
        """
        offset = self.size
        if offset + int(size) > self._reserved:
            raise RuntimeError("HostBuffer.extend failed")
        self.size += int(size)
        if register and size:
            self.register(offset, size)
        return self.get_raw_address() + offset

    def read_file_slice(
        self,
        file: int | _File,
        file_offset: int,
        size: int,
        offset: int = 0,
        stream: int = 0,
        device_ptr: int = 0,
        device: int | None = None,
    ) -> None:
        """Read a part of a file into the buffer, and copy it to a card if `device_ptr` is set."""
        address = self.get_raw_address() + int(offset)
        _read(file, file_offset, size, address)
        if device_ptr:
            ctypes.memmove(device_ptr, address, int(size))
        if device is not None and device >= 0:
            machine.cards[device].to_card += int(size)
        self.size = max(self.size, int(offset) + int(size))

    def register(self, offset: int, size: int) -> None:
        address = self.get_raw_address() + int(offset)
        if machine.pinned.register(address, int(size)):
            raise RuntimeError("HostBuffer.register failed")
        self._registered.append(address)

    def unregister(self, offset: int) -> None:
        if machine.pinned.unregister(self.get_raw_address() + int(offset)):
            raise RuntimeError("HostBuffer.unregister failed")

    def truncate(self, size: int, do_unregister: bool = True) -> None:
        """Shrink the buffer to `size` bytes.

        Raises:
            RuntimeError: the buffer is smaller, or the range to unregister is not registered.
        """
        if size >= self.size or (do_unregister and machine.pinned.unregister(self.get_raw_address() + int(size))):
            raise RuntimeError("HostBuffer.truncate failed")
        self.size = int(size)

    def __del__(self) -> None:
        for address in getattr(self, "_registered", ()):
            machine.pinned.unregister(address)


class ModelMMAP:
    """A memory-mapped file with copy-on-write, like `comfy_aimdo.model_mmap.ModelMMAP`."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._handle = os.open(path, os.O_RDONLY)
        self._map = mmap.mmap(self._handle, 0, access=mmap.ACCESS_COPY)

    def get(self) -> int:
        return ctypes.addressof(ctypes.c_uint8.from_buffer(self._map))

    def get_file_handle(self) -> int:
        return self._handle

    def bounce(self) -> bool:
        return True

    def __del__(self) -> None:
        if hasattr(self, "_handle"):
            os.close(self._handle)


def read_file_to_device(
    file: int | _File,
    file_offset: int,
    size: int,
    stream: int,
    device_ptr: int,
    device: int,
    mark_cold: bool = True,
) -> None:
    """Read a part of a file into a card's memory. `device_ptr` is 0 for hollow cards."""
    if device_ptr:
        _read(file, file_offset, size, device_ptr)
    machine.cards[device].to_card += int(size)


def _read(file: int | _File, file_offset: int, size: int, address: int) -> None:
    handle = file if isinstance(file, int) else file.fileno()
    target = memoryview((ctypes.c_uint8 * int(size)).from_address(address)).cast("B")
    done = 0
    while done < size:
        count = os.preadv(handle, [target[done:]], int(file_offset) + done)
        if count <= 0:
            raise RuntimeError("hostbuf_file_reader_read failed")
        done += count


def _reserve(size: int) -> torch.Tensor:
    """A uint8 tensor [size] in RAM that uses physical memory only once it is written."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    return torch.frombuffer(mmap.mmap(-1, size, flags=flags), dtype=torch.uint8)


def _nothing(*_: Any) -> None:  # noqa: ANN401
    return None


MODULES: dict[str, dict[str, Any]] = {
    "vram_buffer": {"VRAMBuffer": VRAMBuffer},
    "host_buffer": {
        "HostBuffer": HostBuffer,
        "read_file_to_device": read_file_to_device,
        "cleanup_file_reader": _nothing,
    },
    "model_mmap": {"ModelMMAP": ModelMMAP},
}
