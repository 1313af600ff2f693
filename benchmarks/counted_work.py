"""Counts the work of operators without computing: floating-point operations, bytes read and written, calls."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch._prims_common import suggest_memory_format
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten

CONVOLUTION, LINEAR, ATTENTION = "convolution", "linear", "attention"
_PRODUCTS = {aten.mm.default: 0, aten.addmm.default: 1, aten.bmm.default: 0, aten.baddbmm.default: 1}
#: Operators that only allocate memory or create views, although their schemas do not say so.
_FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "device", "sym_size",
         "is_pinned", "record_stream", "_reshape_alias", "lift_fresh"}  # fmt: skip
#: In-place operators that do not read what they overwrite.
_OVERWRITE = {"copy_", "fill_", "zero_"}


@dataclass
class Total:
    """Work of one operator.

    Attributes:
        calls: number of calls.
        operations: floating-point operations of its products, two per multiply-add.
        read, written: bytes of its inputs and outputs.
    """

    calls: int = 0
    operations: int = 0
    read: int = 0
    written: int = 0

    @property
    def moved(self) -> int:
        return self.read + self.written


class Work(TorchDispatchMode):
    """Counts the operators that run in this context. Views and allocations are free.

    Attributes:
        by_operator: work by name of the operator, without its overload.
        by_kind: floating-point operations of convolutions, linear layers and attention.
        layout: estimated bytes to convert convolutions to channels last, not included elsewhere.
    """

    def __init__(self) -> None:
        super().__init__()
        self.by_operator: dict[str, Total] = {}
        self.by_kind = {CONVOLUTION: 0, LINEAR: 0, ATTENTION: 0}
        self.layout = 0

    @property
    def total(self) -> Total:
        """Sum over all operators."""
        parts = self.by_operator.values()
        return Total(
            *(sum(getattr(part, name) for part in parts) for name in ("calls", "operations", "read", "written"))
        )

    def add(self, name: str, read: int, written: int, operations: int = 0, kind: str | None = None) -> None:
        """Add a call of an operator."""
        total = self.by_operator.setdefault(name, Total())
        total.calls += 1
        total.operations += operations
        total.read += read
        total.written += written
        if kind is not None:
            self.by_kind[kind] += operations

    def __torch_dispatch__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:  # noqa: ANN401 - PyTorch's protocol
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        schema = function._schema
        name = schema.name.split("::")[1]
        written_to = [value for value in schema.returns if value.alias_info is not None]
        is_view = bool(written_to) and not schema.is_mutable
        if not is_view and name not in _FREE:
            inputs = [*args, *kwargs.values()]
            if name in _OVERWRITE:
                inputs = inputs[1:]
            elif "out" in kwargs:
                inputs = [*args, *(value for key, value in kwargs.items() if key != "out")]
            self.add(name, _bytes(inputs), _bytes(result), *_products(function, args, result))
        if function is aten.convolution.default:
            self._around_convolution(*args[:3], result)
        return result

    def _around_convolution(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor
    ) -> None:
        """Count what PyTorch and cuDNN do inside a convolution: adding the bias, and changing the memory layout."""
        if bias is not None:
            self.add("convolution's bias", _bytes(out), _bytes(out))
        channels_first = [t for t in (x, weight) if suggest_memory_format(t) == torch.contiguous_format]
        if len(channels_first) == 2:  # tensor cores compute in channels last: cuDNN changes the result back as well
            channels_first.append(out)
        self.layout += 2 * _bytes(channels_first)


def _products(function: Any, args: tuple[Any, ...], result: Any) -> tuple[int, str | None]:  # noqa: ANN401
    """Floating-point operations of an operator, and their kind."""
    if function is aten.convolution.default:
        return 2 * result.numel() * math.prod(args[1].shape[1:]), CONVOLUTION
    first = _PRODUCTS.get(function)
    if first is not None:
        return 2 * result.numel() * args[first].shape[-1], LINEAR
    return 0, None


def _bytes(values: Any) -> int:  # noqa: ANN401 - any structure of tensors
    """Size of the memory of tensors, counting expanded dimensions once."""
    total = 0
    for value in tree_leaves(values):
        if isinstance(value, torch.Tensor):
            numbers = math.prod(size for size, step in zip(value.shape, value.stride(), strict=True) if step)
            total += numbers * value.element_size() if value.numel() else 0
    return total


class CardKernels(TorchFunctionMode):
    """Makes fake tensors run the operators of a card where these differ, counted by `work`.

    Attention is a single operator, with the memory layout of flash attention and cuDNN, [N, L, H, D]. Group norm has no
    CUDA kernel for channels last, so it copies its input and returns channels first.
    """

    def __init__(self, work: Work) -> None:
        super().__init__()
        self._work = work

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:  # noqa: ANN401 - PyTorch's protocol
        if function is torch.nn.functional.scaled_dot_product_attention:
            return self._attention(*args[:3])
        if function is torch.nn.functional.group_norm:
            args = (args[0].contiguous(), *args[1:])
        return function(*args, **(kwargs or {}))

    def _attention(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        count, heads, length, _ = query.shape
        out = query.new_empty(count, length, heads, value.shape[-1]).transpose(1, 2)
        operations = 2 * query.numel() * key.shape[2] + 2 * out.numel() * key.shape[2]
        self._work.add("scaled_dot_product_attention", _bytes([query, key, value]), _bytes(out), operations, ATTENTION)
        return out
