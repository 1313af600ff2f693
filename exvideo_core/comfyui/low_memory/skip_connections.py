"""A UNet's skip connections, offloaded to host memory, and their lazy concatenation.

`torch.cat([h, skip])` in ComfyUI's UNet is dispatched here (`__torch_function__`) and returns a `LazyConcat`, which the
block's first layer reads chunk by chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from .host_buffers import HostBuffers


class SkipConnection:
    """The tensor of a skip connection [N, C, H, W], kept on its device or in host memory.

    On a GPU, copies run on a separate stream, in parallel with the computation.

    Args:
        tensor: the tensor.
        buffers: where its copy in host memory goes; None keeps the tensor on its device.
    """

    def __init__(self, tensor: torch.Tensor, buffers: HostBuffers | None) -> None:
        self.shape = tensor.shape
        self.device = tensor.device
        self.dtype = tensor.dtype
        #: The tensor itself, for the next layer; None once that layer has taken it.
        self.live: torch.Tensor | None = tensor
        self.held = tensor if buffers is None else _offload(tensor, buffers.take(tensor))

    def take(self) -> torch.Tensor:
        """The tensor for the next layer; from then on only the held copy is kept."""
        assert self.live is not None
        live, self.live = self.live, None
        return live

    def fetch(self, start: int, end: int) -> tuple[torch.Tensor, torch.cuda.Event | None]:
        """Frames [end - start, C, H, W] on the device that computes with them, and the event to wait for."""
        part = self.held[start:end]
        if part.device == self.device:
            return part, None
        if self.device.type != "cuda":
            return part.to(self.device), None
        stream = _copy_stream(self.device)
        with torch.cuda.stream(stream):
            moved = part.to(self.device, non_blocking=True)
        moved.record_stream(torch.cuda.current_stream(self.device))
        return moved, stream.record_event()

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:  # noqa: ANN401 - PyTorch's protocol
        if function is torch.cat and dict(kwargs or {}).get("dim", args[1] if len(args) > 1 else 0) == 1:
            return LazyConcat(args[0])
        return NotImplemented


class LazyConcat:
    """Tensors and skip connections concatenated along channels, read by frames."""

    def __init__(self, parts: Sequence[torch.Tensor | SkipConnection]) -> None:
        self._parts: list[torch.Tensor | SkipConnection] = list(parts)
        count, _, height, width = parts[0].shape
        self.shape = torch.Size((count, sum(part.shape[1] for part in parts), height, width))
        self.device, self.dtype = parts[0].device, parts[0].dtype

    def read_chunks(self, ranges: Sequence[tuple[int, int]]) -> Iterator[torch.Tensor]:
        """The frames of each range [n, C, H, W], channels last; the next range is fetched while one is in use."""
        fetched = self._fetch(*ranges[0])
        for following in [*ranges[1:], None]:
            ready, fetched = fetched, self._fetch(*following) if following else []
            parts = []
            for part, arrival in ready:
                if arrival is not None:
                    torch.cuda.current_stream(self.device).wait_event(arrival)
                parts.append(part.contiguous(memory_format=torch.channels_last))
            yield torch.cat(parts, dim=1)

    def _fetch(self, start: int, end: int) -> list[tuple[torch.Tensor, torch.cuda.Event | None]]:
        return [
            part.fetch(start, end) if isinstance(part, SkipConnection) else (part[start:end], None)
            for part in self._parts
        ]

    def whole(self) -> torch.Tensor:
        """The concatenated tensor [N, C, H, W], channels last."""
        return next(self.read_chunks([(0, self.shape[0])]))

    def release(self) -> None:
        """Drop the tensors: ComfyUI still holds this object while the block that has read it goes on."""
        self._parts.clear()


def _offload(tensor: torch.Tensor, held: torch.Tensor) -> torch.Tensor:
    """Copy `tensor` to `held`, in host memory. On a GPU the copy may still be running."""
    if tensor.device.type != "cuda":
        return held.copy_(tensor)
    stream = _copy_stream(tensor.device)
    stream.wait_stream(torch.cuda.current_stream(tensor.device))
    with torch.cuda.stream(stream):
        held.copy_(tensor, non_blocking=True)
    tensor.record_stream(stream)  # its memory is not reused before the copy is done
    return held


_streams: dict[torch.device, torch.cuda.Stream] = {}


def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)
    return _streams[device]
