"""Memory of simulated cards, and pinned host memory."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

GIB = 2**30
MIB = 2**20
#: Block sizes of PyTorch's CUDA allocator are multiples of this.
BLOCK = 512


@dataclass(frozen=True)
class Card:
    """A card to simulate.

    Attributes:
        total: memory in bytes.
        held: bytes of it used by the desktop and the driver.
        name: result of `torch.cuda.get_device_name`.
        capability: CUDA compute capability.
    """

    total: int
    held: int = 0
    name: str = "NVIDIA GeForce RTX 4090 (simulated)"
    capability: tuple[int, int] = (8, 9)


class CardMemory:
    """Memory of a card in use by this process, in bytes.

    Attributes:
        now: current use.
        peak: maximum since the start or the last `reset_peak`.
        to_card, to_host: bytes copied in each direction.
    """

    def __init__(self, card: Card, index: int) -> None:
        self.card = card
        self.index = index
        self.now = 0
        self.peak = 0
        self.to_card = 0
        self.to_host = 0
        #: Called before each allocation with its size, to free memory.
        self.make_room: Callable[[int], None] | None = None
        self._lock = threading.RLock()

    @property
    def free(self) -> int:
        """Free bytes."""
        return max(self.card.total - self.card.held - self.now, 0)

    def reset_peak(self) -> None:
        self.peak = self.now

    def allocate(self, size: int) -> None:
        """Allocate `size` bytes.

        Raises:
            torch.OutOfMemoryError: fewer bytes are free.
        """
        with self._lock:
            if size and self.make_room is not None:
                self.make_room(size)
            if size > self.free:
                raise torch.OutOfMemoryError(
                    f"CUDA out of memory. Tried to allocate {size / MIB:.2f} MiB. GPU {self.index} has a total "
                    f"capacity of {self.card.total / GIB:.2f} GiB of which {self.free / MIB:.2f} MiB is free "
                    "(simulated card)."
                )
            self.hold(size)

    def hold(self, size: int) -> None:
        """Allocate bytes that are known to be free."""
        with self._lock:
            self.now += size
            self.peak = max(self.peak, self.now)

    def release(self, size: int) -> None:
        with self._lock:
            self.now -= size


class PinnedMemory:
    """Pinned (page-locked) host memory, in bytes.

    PyTorch's allocator rounds each request up to a power of two and caches freed blocks for requests of the same size.

    Attributes:
        now: blocks in use, cached blocks and registered ranges.
        peak: maximum since the start or the last `reset_peak`.
        cached: cached blocks.
        registered: ranges pinned by `cudaHostRegister`.
    """

    def __init__(self) -> None:
        self.now = 0
        self.peak = 0
        self.cached = 0
        self.registered = 0
        self._free_blocks: dict[int, int] = {}
        self._ranges: dict[int, int] = {}
        self._lock = threading.RLock()

    def reset_peak(self) -> None:
        self.peak = self.now

    def allocate(self, size: int) -> int:
        """Allocate a block for `size` bytes, and return the size of the block."""
        block = 1 << max(size - 1, 0).bit_length()
        with self._lock:
            if self._free_blocks.get(block):
                self._free_blocks[block] -= 1
                self.cached -= block
            else:
                self._hold(block)
        return block

    def release(self, block: int) -> None:
        with self._lock:
            self._free_blocks[block] = self._free_blocks.get(block, 0) + 1
            self.cached += block

    def empty_cache(self) -> None:
        with self._lock:
            self.now -= self.cached
            self.cached = 0
            self._free_blocks.clear()

    def register(self, address: int, size: int) -> int:
        """Pin a range like `cudaHostRegister`. Returns 0, or 712 if a part of it is already pinned."""
        with self._lock:
            if any(start < address + size and address < start + length for start, length in self._ranges.items()):
                return 712
            self._ranges[address] = size
            self.registered += size
            self._hold(size)
        return 0

    def unregister(self, address: int) -> int:
        """Unpin a range like `cudaHostUnregister`. Returns 0, or 713 if no range starts at this address."""
        with self._lock:
            size = self._ranges.pop(address, None)
            if size is None:
                return 713
            self.registered -= size
            self.now -= size
        return 0

    def holds(self, address: int) -> bool:
        """Whether an address is in a registered range."""
        return any(start <= address < start + size for start, size in list(self._ranges.items()))

    def _hold(self, size: int) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)


class Machine:
    """The simulated cards and pinned memory of this process.

    Attributes:
        hollow: whether the cards' tensors have shapes but no data.
    """

    def __init__(self) -> None:
        self.cards: list[CardMemory] = []
        self.pinned = PinnedMemory()
        self.hollow = False

    def set_up(self, cards: Sequence[Card], hollow: bool) -> None:
        if self.cards:
            raise RuntimeError("Simulated cards are already installed.")
        self.cards = [CardMemory(card, index) for index, card in enumerate(cards)]
        self.hollow = hollow


machine = Machine()
