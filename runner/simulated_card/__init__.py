"""NVIDIA cards that are not there, for tests and for measures of memory on machines without one.

`install` makes PyTorch believe in CUDA cards: their tensors say `cuda:0`, compute in RAM, count as memory of the card,
and refuse to meet tensors of another device. `python -m runner.simulated_card` starts a ComfyUI on them.
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
    """Simulate cards in this process. Call it before `comfy` is imported, and enter `active()` in each thread.

    Args:
        cards: the cards, `cuda:0` first.
        hollow: their tensors have sizes and no numbers, so that models of full size run for their memory alone.
        dynamic: stand in for `comfy_aimdo` too, the library under ComfyUI's dynamic VRAM.
        headroom: bytes of each card that dynamic VRAM leaves free.
        page: bytes of a page of dynamic VRAM.

    Raises:
        RuntimeError: cards are installed already.
    """
    from . import cuda
    from . import dynamic as dynamic_vram

    machine.set_up(cards, hollow)
    cuda.install()
    if dynamic:
        dynamic_vram.install(headroom, page)


def memory(index: int = 0) -> CardMemory:
    """What this process holds of a card: `.now`, `.peak`, `.reset_peak()`, and bytes copied either way."""
    return machine.cards[index]


def pinned() -> PinnedMemory:
    """The page-locked host memory: `.now`, `.peak`, `.reset_peak()`."""
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
