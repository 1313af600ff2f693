"""Skip tensors of a UNet that wait in host memory, and their concatenation, which is never made whole.

`torch.cat([h, skip])` in the host's UNet is dispatched here (`__torch_function__`) and gives a `Joined`, of which the
first layer of the block reads chunk by chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch


class Skip:
    """A skip tensor [N, C, H, W], held where it is or in host memory.

    On a GPU copies run on a stream of their own, beside the computation; host memory is pinned, and PyTorch keeps it
    for the next call.
    """

    def __init__(self, tensor: torch.Tensor, offload: bool) -> None:
        self.shape = tensor.shape
        self.device = tensor.device
        self.dtype = tensor.dtype
        #: The tensor itself, for the layer that comes next; None once that layer has it.
        self.live: torch.Tensor | None = tensor
        self.held = _offloaded(tensor) if offload else tensor

    def take(self) -> torch.Tensor:
        """The tensor for the layer that comes next; from then on only the held copy is kept."""
        assert self.live is not None
        live, self.live = self.live, None
        return live

    def fetch(self, start: int, end: int) -> tuple[torch.Tensor, torch.cuda.Event | None]:
        """Frames on the device that computes with them, and what to wait for before they are read."""
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
            return Joined(args[0])
        return NotImplemented


class Joined:
    """Tensors and skips joined along channels, read by frames."""

    def __init__(self, parts: Sequence[torch.Tensor | Skip]) -> None:
        self._parts: list[torch.Tensor | Skip] = list(parts)
        count, _, height, width = parts[0].shape
        self.shape = torch.Size((count, sum(part.shape[1] for part in parts), height, width))
        self.device, self.dtype = parts[0].device, parts[0].dtype

    def chunks(self, spans: Sequence[tuple[int, int]]) -> Iterator[torch.Tensor]:
        """The frames of each span [n, C, H, W], channels last; the next span is fetched while one is used."""
        fetched = self._fetch(*spans[0])
        for following in [*spans[1:], None]:
            ready, fetched = fetched, self._fetch(*following) if following else []
            parts = []
            for part, arrival in ready:
                if arrival is not None:
                    torch.cuda.current_stream(self.device).wait_event(arrival)
                parts.append(part.contiguous(memory_format=torch.channels_last))
            yield torch.cat(parts, dim=1)

    def _fetch(self, start: int, end: int) -> list[tuple[torch.Tensor, torch.cuda.Event | None]]:
        return [part.fetch(start, end) if isinstance(part, Skip) else (part[start:end], None) for part in self._parts]

    def release(self) -> None:
        """Let go of the tensors: the host still holds this object while the block that has read it goes on."""
        self._parts.clear()


def _offloaded(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in host memory, pinned where a GPU copies from it. The copy may still be under way."""
    on_gpu = tensor.device.type == "cuda"
    held = torch.empty_like(tensor, device="cpu", pin_memory=on_gpu)
    if not on_gpu:
        return held.copy_(tensor)
    stream = _copy_stream(tensor.device)
    stream.wait_stream(torch.cuda.current_stream(tensor.device))
    with torch.cuda.stream(stream):
        held.copy_(tensor, non_blocking=True)
    tensor.record_stream(stream)  # its memory is not given to others before the copy is done
    return held


_streams: dict[torch.device, torch.cuda.Stream] = {}


def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)
    return _streams[device]
