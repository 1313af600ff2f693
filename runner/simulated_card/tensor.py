"""Tensors of a simulated card, which report the device `cuda:N` and wrap a tensor in RAM."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .memory import BLOCK, CardMemory, machine


class DeviceMismatch(RuntimeError):
    """The tensors of an operator are on different devices."""


class IllegalAccess(RuntimeError):
    """Memory of a card was used after it was freed."""


class Allocation:
    """A block of a card's memory, freed with the last tensor that is a view of it."""

    __slots__ = ("storage", "size", "memory", "valid", "__weakref__")

    def __init__(self, storage: torch.UntypedStorage, memory: CardMemory | None) -> None:
        self.size = 0  # for __del__, if the allocation fails
        self.memory = memory
        self.storage = storage
        self.valid = True
        if memory is not None:
            size = -(-storage.nbytes() // BLOCK) * BLOCK
            memory.allocate(size)
            self.size = size

    def __del__(self) -> None:
        if self.memory is not None:
            self.memory.release(self.size)


#: Allocations by their storage's address. Each keeps its storage alive, so that addresses are unique.
_allocations: weakref.WeakValueDictionary[int, Allocation] = weakref.WeakValueDictionary()


def allocation_of(storage: torch.UntypedStorage, memory: CardMemory | None) -> Allocation:
    """The existing allocation of a storage, or a new one.

    Args:
        storage: the storage.
        memory: the card whose memory a new allocation uses; None if it is counted elsewhere.

    Raises:
        torch.OutOfMemoryError: the allocation does not fit on the card.
    """
    key = storage._cdata
    found = _allocations.get(key)
    if found is None:
        found = _allocations[key] = Allocation(storage, memory)
    return found


class CardTensor(torch.Tensor):
    """A tensor of a simulated card.

    All its operators go through `functions.call`.

    Args:
        inner: the tensor in RAM, or on the meta device if cards are hollow.
        index: index of the card.
        allocation: its memory, if it is already allocated.

    Raises:
        torch.OutOfMemoryError: the tensor does not fit on the card.
    """

    inner: torch.Tensor
    index: int
    allocation: Allocation

    @staticmethod
    def __new__(
        cls: type[CardTensor], inner: torch.Tensor, index: int, allocation: Allocation | None = None
    ) -> CardTensor:
        if allocation is None:
            allocation = allocation_of(inner.untyped_storage(), machine.cards[index])
        tensor = torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), dtype=inner.dtype, device=torch.device("cuda", index)
        )
        tensor.inner = inner
        tensor.index = index
        tensor.allocation = allocation
        return tensor

    def record_stream(self, stream: object) -> None:
        """Does nothing, since operators run in order."""

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - PyTorch's protocol
        from .functions import call

        return call(func, types, args, kwargs or {})

    __torch_dispatch__ = __torch_function__


def reveal(tensor: CardTensor) -> torch.Tensor:
    """The tensor in RAM.

    Raises:
        IllegalAccess: dynamic VRAM has evicted the memory.
    """
    if not tensor.allocation.valid:
        raise IllegalAccess(
            "CUDA error: an illegal memory access was encountered (simulated card: a weight was read after it was "
            "unpinned and evicted)"
        )
    return tensor.inner
