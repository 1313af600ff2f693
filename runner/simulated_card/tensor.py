"""Tensors of a simulated card: they say that they are on `cuda:N`, and hold a tensor in RAM that nobody else sees."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .memory import BLOCK, CardMemory, machine


class DeviceMismatch(RuntimeError):
    """Tensors of different devices met in one operator."""


class IllegalAccess(RuntimeError):
    """Memory of a card was used after it had been given back."""


class Allocation:
    """A block of a card's memory, shared by the tensors that are views of it; freed with the last of them."""

    __slots__ = ("storage", "size", "memory", "valid", "__weakref__")

    def __init__(self, storage: torch.UntypedStorage, memory: CardMemory | None) -> None:
        self.size = 0  # for __del__, if there is no room
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


#: Allocations by their storage's address; each keeps its storage, so that no address comes twice.
_allocations: weakref.WeakValueDictionary[int, Allocation] = weakref.WeakValueDictionary()


def allocation_of(storage: torch.UntypedStorage, memory: CardMemory | None) -> Allocation:
    """The allocation of a storage: the one its views have already, or a new one.

    Args:
        memory: the card that pays for a new one; None if it is paid for elsewhere.

    Raises:
        torch.OutOfMemoryError: the card has no room for it.
    """
    key = storage._cdata
    found = _allocations.get(key)
    if found is None:
        found = _allocations[key] = Allocation(storage, memory)
    return found


class CardTensor(torch.Tensor):
    """A tensor of a simulated card.

    Everything that is done with it goes through `functions.call`.

    Args:
        inner: the tensor in RAM with the numbers, or on the meta device if cards are hollow.
        index: number of the card.
        allocation: the memory it lies in, if it is known.

    Raises:
        torch.OutOfMemoryError: the card has no room for it.
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
        """Nothing to do: memory is freed in order."""

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
        IllegalAccess: dynamic VRAM has taken the memory back.
    """
    if not tensor.allocation.valid:
        raise IllegalAccess(
            "CUDA error: an illegal memory access was encountered (simulated card: a weight was read after it was "
            "unpinned and evicted)"
        )
    return tensor.inner
