"""Skip tensors of a UNet that wait in host memory, and their concatenation, which is never made whole.

`torch.cat([h, skip])` in the host's UNet is dispatched here (`__torch_function__`) and gives a `Joined`, of which the
first layer of the block reads chunk by chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch


class HostBuffers:
    """Host memory for what has no room on a device, as a UNet's skip tensors: one buffer for each, used by every call.

    PyTorch's own pinned memory would be rounded up to powers of two, stay cached when it is no longer needed, and be
    unknown to the host's accounting.

    Args:
        pin: makes a tensor's memory one that a GPU copies from by itself; False where that is not possible.
        unpin: takes that back, once the copies that still run are done.
    """

    def __init__(self, pin: Callable[[torch.Tensor], bool], unpin: Callable[[torch.Tensor], object]) -> None:
        self._pin, self._unpin = pin, unpin
        self._buffers: list[tuple[torch.Tensor, bool]] = []
        self._used = 0

    def begin(self) -> None:
        """A call begins: what it takes first is the first buffer again."""
        self._used = 0

    def take(self, like: torch.Tensor) -> torch.Tensor:
        """The next buffer, as an empty tensor of the shape, type and memory layout of `like`."""
        place, self._used = self._used, self._used + 1
        if place == len(self._buffers):
            self._buffers.append((torch.empty(0, dtype=torch.uint8), False))
        buffer, _ = self._buffers[place]
        if buffer.nbytes != like.nbytes:
            self._free(place)
            buffer = torch.empty(like.nbytes, dtype=torch.uint8)
            self._buffers[place] = buffer, self._pin(buffer)
        layout = torch.empty_like(like, device="meta")
        return buffer.view(like.dtype).as_strided(layout.shape, layout.stride())

    def release(self) -> None:
        """Give all memory back."""
        for place in range(len(self._buffers)):
            self._free(place)
        self._buffers.clear()

    def _free(self, place: int) -> None:
        buffer, pinned = self._buffers[place]
        if pinned:
            self._unpin(buffer)
        self._buffers[place] = torch.empty(0, dtype=torch.uint8), False

    def __del__(self) -> None:
        self.release()


class Skip:
    """A skip tensor [N, C, H, W], held where it is or in host memory.

    On a GPU copies run on a stream of their own, beside the computation.

    Args:
        tensor: the skip tensor.
        buffers: where its copy in host memory goes; None holds the tensor where it is.
    """

    def __init__(self, tensor: torch.Tensor, buffers: HostBuffers | None) -> None:
        self.shape = tensor.shape
        self.device = tensor.device
        self.dtype = tensor.dtype
        #: The tensor itself, for the layer that comes next; None once that layer has it.
        self.live: torch.Tensor | None = tensor
        self.held = tensor if buffers is None else _copied(tensor, buffers.take(tensor))

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

    def whole(self) -> torch.Tensor:
        """All of it [N, C, H, W], channels last."""
        return next(self.chunks([(0, self.shape[0])]))

    def release(self) -> None:
        """Let go of the tensors: the host still holds this object while the block that has read it goes on."""
        self._parts.clear()


def _copied(tensor: torch.Tensor, held: torch.Tensor) -> torch.Tensor:
    """A copy in host memory, `held`. It may still be under way on a GPU."""
    if tensor.device.type != "cuda":
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
