"""Functions with special handling on cards: copies between devices, pinned memory, reading data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from . import devices, hollow
from .memory import machine
from .tensor import CardTensor, reveal

Function = Callable[..., Any]
_OWN = ("inner", "index", "allocation")
_FALSE = {"is_cpu", "is_meta", "is_mps", "is_xpu", "requires_grad"}


def get_property(func: Function, tensor: CardTensor) -> Any:  # noqa: ANN401
    """Value of a property of a card's tensor."""
    name = func.__self__.__name__  # type: ignore[attr-defined] - of a property's getter
    if name == "device":
        return torch.device("cuda", tensor.index)
    if name == "is_cuda":
        return True
    if name in _FALSE:
        return False
    if name in ("grad", "grad_fn"):
        return None
    result = func(reveal(tensor))
    return CardTensor(result, tensor.index) if isinstance(result, torch.Tensor) else result


def set_property(func: Function, tensor: torch.Tensor, value: Any) -> None:  # noqa: ANN401
    """Set a property of a tensor, if cards support it.

    Raises:
        NotImplementedError: cards do not support it.
    """
    name = func.__self__.__name__  # type: ignore[attr-defined] - of a property's setter
    if name == "data" and (isinstance(tensor, CardTensor) or isinstance(value, CardTensor)):
        _become(tensor, value)
    elif isinstance(tensor, CardTensor):
        if name != "requires_grad" and not (name == "grad" and value is None):
            raise NotImplementedError(f"Tensors of simulated cards do not support setting {name}.")
    else:
        func(tensor, value)


def _become(tensor: torch.Tensor, value: torch.Tensor) -> None:
    """Replace a tensor in place by one on another device, keeping its attributes, as `.data = ` does."""
    attributes = {key: item for key, item in tensor.__dict__.items() if key not in _OWN}
    if isinstance(value, CardTensor):
        new: torch.Tensor = CardTensor(reveal(value), value.index)
        if isinstance(tensor, torch.nn.Parameter):
            new._is_param = True  # type: ignore[attr-defined] - isinstance(new, Parameter) checks this
    else:
        new = value.detach()
        if isinstance(tensor, torch.nn.Parameter):
            new = torch.nn.Parameter(new, requires_grad=False)
    torch.utils.swap_tensors(tensor, new)
    for key, item in attributes.items():
        setattr(tensor, key, item)


def convert(
    tensor: torch.Tensor,
    device: torch.device | str | int | None,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format | None = None,
    copy: bool = False,
) -> Any:  # noqa: ANN401 - a tensor or NotImplemented
    """`tensor.to(...)`, or NotImplemented if no card is involved. `device` None keeps the tensor's device."""
    own = tensor.index if isinstance(tensor, CardTensor) else None
    target = own if device is None else devices.card_index(device)
    if own is not None and target is None and torch.device(device).type != "cpu":
        return reveal(tensor).to(device, dtype)
    if own is None and target is None:
        return NotImplemented
    inner = reveal(tensor) if isinstance(tensor, CardTensor) else tensor.detach()
    dtype = dtype or inner.dtype
    memory_format = memory_format or torch.preserve_format
    if own == target:
        result = inner.to(dtype=dtype, memory_format=memory_format, copy=copy)
        return tensor if result is inner else CardTensor(result, own)
    if machine.hollow:
        result = hollow.blank(tensor, dtype, "cpu" if target is None else "meta")
    else:
        result = inner.to(dtype=dtype, memory_format=memory_format, copy=True)
    _count_copy(own, target, result.nbytes)
    return result if target is None else CardTensor(result, target)


def _count_copy(source: int | None, target: int | None, size: int) -> None:
    if source is None and target is not None:
        machine.cards[target].to_card += size
    elif source is not None and target is None:
        machine.cards[source].to_host += size


def _to(func: Function, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:  # noqa: ANN401
    tensor, rest = args[0], list(args[1:])
    kwargs = dict(kwargs)
    copy = bool(kwargs.pop("copy", False))
    position = 2 if rest and isinstance(rest[0], torch.dtype | torch.Tensor) else 3
    if len(rest) > position:
        copy = bool(rest[position])
        del rest[position]
    other = rest[0] if rest and isinstance(rest[0], torch.Tensor) else kwargs.get("other")
    if other is not None:
        return convert(tensor, devices.device_name(other), other.dtype, kwargs.get("memory_format"), copy)
    if rest and isinstance(rest[0], int) and not isinstance(rest[0], bool):
        rest[0] = torch.device("cuda", rest[0])
    device, dtype, _, memory_format = torch._C._nn._parse_to(*rest, **kwargs)
    return convert(tensor, device, dtype, memory_format, copy)


def _copy(func: Function, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:  # noqa: ANN401
    target = args[0]
    source = args[1] if len(args) > 1 else kwargs["src"]
    ends = [tensor.index if isinstance(tensor, CardTensor) else None for tensor in (target, source)]
    if ends == [None, None]:
        return NotImplemented
    if ends[0] != ends[1]:
        _count_copy(ends[1], ends[0], target.nbytes)
    if machine.hollow:
        torch.broadcast_shapes(target.shape, source.shape)
        return target
    inner, other = (reveal(tensor) if isinstance(tensor, CardTensor) else tensor for tensor in (target, source))
    inner.copy_(other)
    return target


class _PinnedBlock:
    """Attribute of a storage that frees its pinned memory along with it."""

    def __init__(self, size: int) -> None:
        self.size = machine.pinned.allocate(size)

    def __del__(self) -> None:
        machine.pinned.release(self.size)


def pin(tensor: torch.Tensor) -> torch.Tensor:
    """Mark a new tensor in RAM as pinned, and return it."""
    storage = tensor.untyped_storage()
    storage._pinned_block = _PinnedBlock(storage.nbytes())  # type: ignore[attr-defined]
    return tensor


def _pin_memory(func: Function, args: Sequence[Any], kwargs: dict[str, Any]) -> torch.Tensor:
    tensor = args[0]
    if isinstance(tensor, CardTensor):
        raise RuntimeError(f"Cannot pin a tensor on cuda:{tensor.index}: only dense CPU tensors can be pinned.")
    return tensor if is_pinned(tensor) else pin(tensor.detach().clone())


def is_pinned(tensor: torch.Tensor, device: Any = None) -> bool:  # noqa: ANN401
    """Whether a tensor is in pinned memory."""
    if isinstance(tensor, CardTensor) or tensor.device.type != "cpu":
        return False
    return hasattr(tensor.untyped_storage(), "_pinned_block") or machine.pinned.holds(tensor.data_ptr())


def _as_tensor(func: Function, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:  # noqa: ANN401
    """`torch.tensor`, `as_tensor` and `asarray`, which also accept tensors."""
    names = ("data", "dtype", "device")
    options = {**dict(zip(names, args, strict=False)), **kwargs}
    data, device = options.pop("data", None), options.pop("device", None)
    if isinstance(data, torch.Tensor):
        copy = func is torch.tensor or bool(options.get("copy"))
        found = convert(data, device, options.get("dtype"), copy=copy)
        return func(*args, **kwargs) if found is NotImplemented else found
    index = None if device is None else devices.card_index(device)
    if index is None:
        return NotImplemented
    options.pop("pin_memory", None)
    tensor = func(data, **options)
    return CardTensor(hollow.blank(tensor, None) if machine.hollow else tensor, index)


def _refuse_numpy(func: Function, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:  # noqa: ANN401
    if not isinstance(args[0], CardTensor):
        return NotImplemented
    raise TypeError(
        f"can't convert cuda:{args[0].index} device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host "
        "memory first."
    )


def _refuse_autograd(func: Function, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:  # noqa: ANN401
    if not isinstance(args[0], CardTensor):
        return NotImplemented
    raise NotImplementedError("Simulated cards do not support autograd.")


def _deepcopy(func: Function, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:  # noqa: ANN401
    tensor, memo = args
    if not isinstance(tensor, CardTensor):
        return NotImplemented
    if id(tensor) not in memo:
        copied = CardTensor(reveal(tensor).clone(), tensor.index)
        copied.__dict__.update({key: item for key, item in tensor.__dict__.items() if key not in _OWN})
        memo[id(tensor)] = copied
    return memo[id(tensor)]


def _from_host(tensor: torch.Tensor, index: int) -> torch.Tensor:
    return tensor.to(torch.device("cuda", index))


def _on_card(handler: Callable[..., Any]) -> Function:
    """A handler for tensors of a card only: `handler(tensor, *args)`."""

    def handle(func: Function, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:  # noqa: ANN401
        return handler(*args, **kwargs) if isinstance(args[0], CardTensor) else NotImplemented

    return handle


def _converting(handler: Callable[..., Any]) -> Function:
    return lambda func, args, kwargs: handler(*args, **kwargs)


def _iterate(tensor: CardTensor) -> Iterator[torch.Tensor]:
    return iter(torch.Tensor.unbind(tensor))


def _type(tensor: CardTensor, dtype: Any = None, *_: Any) -> Any:  # noqa: ANN401
    if dtype is None:
        return reveal(tensor).type().replace("torch.", "torch.cuda.")
    return convert(tensor, None, dtype) if isinstance(dtype, torch.dtype) else NotImplemented


def _describe(tensor: CardTensor, **_: Any) -> str:  # noqa: ANN401
    if machine.hollow or not tensor.allocation.valid:
        return (
            f"tensor(..., device='cuda:{tensor.index}', size={tuple(tensor.inner.shape)}, dtype={tensor.inner.dtype})"
        )
    return f"{repr(tensor.inner)[:-1]}, device='cuda:{tensor.index}')"


def _cudnn(
    tensor: CardTensor,
    weight: torch.Tensor,
    padding: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    **_: Any,  # noqa: ANN401
) -> torch.Tensor:
    """ComfyUI calls cuDNN directly with some of its versions."""
    return torch.convolution(tensor, weight, None, stride, padding, dilation, False, [0] * len(padding), groups)


def _cpu(tensor: torch.Tensor, memory_format: torch.memory_format | None = None) -> Any:  # noqa: ANN401
    return convert(tensor, "cpu", memory_format=memory_format)


def _cuda(
    tensor: torch.Tensor,
    device: torch.device | str | int | None = None,
    non_blocking: bool = False,
    memory_format: torch.memory_format | None = None,
) -> Any:  # noqa: ANN401
    return convert(tensor, torch.device("cuda", devices.card_index(device)), memory_format=memory_format)


def _type_as(tensor: torch.Tensor, other: torch.Tensor) -> Any:  # noqa: ANN401
    return convert(tensor, devices.device_name(other), other.dtype)


HANDLERS: dict[str, Function] = {
    "to": _to,
    "copy_": _copy,
    "cpu": _converting(_cpu),
    "cuda": _converting(_cuda),
    "type_as": _converting(_type_as),
    "type": _on_card(_type),
    "pin_memory": _pin_memory,
    "is_pinned": _converting(is_pinned),
    "tensor": _as_tensor,
    "as_tensor": _as_tensor,
    "asarray": _as_tensor,
    "numpy": _refuse_numpy,
    "__array__": _refuse_numpy,
    "__dlpack__": _refuse_numpy,
    "backward": _refuse_autograd,
    "register_hook": _refuse_autograd,
    "cudnn_convolution": _on_card(_cudnn),
    "__deepcopy__": _deepcopy,
    "__reduce_ex__": _on_card(lambda tensor, _: (_from_host, (_cpu(tensor), tensor.index))),
    "__repr__": _on_card(_describe),
    "__iter__": _on_card(_iterate),
    "tolist": _on_card(lambda tensor: _cpu(tensor).tolist()),
    "get_device": _on_card(lambda tensor: tensor.index),
    "data_ptr": _on_card(lambda tensor: 0 if machine.hollow else reveal(tensor).data_ptr()),
    "untyped_storage": _on_card(lambda tensor: reveal(tensor).untyped_storage()),
    "requires_grad_": _on_card(lambda tensor, *_, **__: tensor),
    "share_memory_": _on_card(lambda tensor: tensor),
    "is_shared": _on_card(lambda tensor: True),
    "_has_compatible_shallow_copy_type": _converting(lambda *tensors: True),
}

__all__ = ["HANDLERS", "convert", "get_property", "is_pinned", "pin", "set_property"]
