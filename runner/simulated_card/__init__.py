"""Simulates NVIDIA cards, for tests and memory measurements on machines without one.

After `install`, PyTorch reports CUDA cards. Their tensors are on `cuda:0`, compute in RAM, count toward the card's
memory, and raise errors when they meet tensors of another device. `python -m runner.simulated_card` starts ComfyUI on
such cards.
"""

from __future__ import annotations

from collections.abc import Sequence

from .counting import counting
from .dynamic import DynamicMemory
from .dynamic import state as dynamic_memory
from .functions import activate_threads, active
from .memory import GIB, MIB, Card, CardMemory, PinnedMemory, machine
from .tensor import CardTensor, DeviceMismatch, IllegalAccess

DEFAULT_CARDS = (Card(24 * GIB),)


def install(
    cards: Sequence[Card] = DEFAULT_CARDS,
    hollow: bool = False,
    dynamic: bool = False,
    headroom: int = 512 * MIB,
    page: int = 32 * MIB,
) -> None:
    """Simulate cards in this process. Call it before importing `comfy`, and enter `active()` in each thread.

    Args:
        cards: the cards, `cuda:0` first.
        hollow: tensors have shapes but no data, to measure the memory of full-size models.
        dynamic: also replace `comfy_aimdo`, the library behind ComfyUI's dynamic VRAM.
        headroom: bytes of each card that dynamic VRAM leaves free.
        page: page size of dynamic VRAM, in bytes.

    Raises:
        RuntimeError: cards are already installed.
    """
    from . import cuda
    from . import dynamic as dynamic_vram

    machine.set_up(cards, hollow)
    cuda.install()
    if dynamic:
        dynamic_vram.install(headroom, page)


def memory(index: int = 0) -> CardMemory:
    """Memory of a card in use by this process: `.now`, `.peak`, `.reset_peak()`, and bytes copied in each direction."""
    return machine.cards[index]


def pinned() -> PinnedMemory:
    """Pinned host memory in use: `.now`, `.peak`, `.reset_peak()`."""
    return machine.pinned


__all__ = [
    "GIB",
    "MIB",
    "Card",
    "CardMemory",
    "CardTensor",
    "DeviceMismatch",
    "DynamicMemory",
    "IllegalAccess",
    "PinnedMemory",
    "activate_threads",
    "active",
    "counting",
    "dynamic_memory",
    "install",
    "memory",
    "pinned",
]
