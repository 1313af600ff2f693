"""Feature maps of a video's frames, some of them offloaded to host memory."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch

from .host_buffers import HostBuffers


class FrameMaps:
    """Feature maps [B*T, C, H, W] of B videos, channels last: the first frames on the device, the rest in host memory.

    All computation runs on the device and in the same order, so that where the frames are kept changes no number.

    Args:
        on_device: the first frames [n, H, W, C], contiguous.
        in_host: the other frames [m, H, W, C], of a single video.
        frames: per video (default: all frames are one video's).
    """

    def __init__(self, on_device: torch.Tensor, in_host: torch.Tensor | None = None, frames: int | None = None) -> None:
        self._device, self._host = on_device, in_host
        height, width, channels = on_device.shape[1:]
        count = len(on_device) + (0 if in_host is None else len(in_host))
        self.shape = torch.Size((count, channels, height, width))
        self.device, self.dtype = on_device.device, on_device.dtype
        self.video_frames = count if frames is None else frames
        assert in_host is None or self.video_frames == count

    @classmethod
    def of(cls, x: torch.Tensor, frames: int) -> FrameMaps:
        """A view of a tensor [B*T, C, H, W] in channels-last memory, with T = `frames`."""
        return cls(x.permute(0, 2, 3, 1), frames=frames)

    @classmethod
    def empty(
        cls, shape: Sequence[int], dtype: torch.dtype, device: torch.device, max_bytes: float, buffers: HostBuffers
    ) -> FrameMaps:
        """Uninitialized maps of one video, with at most `max_bytes` on the device.

        Args:
            shape: [T, C, H, W].
        """
        count, channels, height, width = shape
        each = channels * height * width * dtype.itemsize
        fit = count if math.isinf(max_bytes) else min(int(max(max_bytes, 0) // each), count)
        on_device = torch.empty(fit, height, width, channels, dtype=dtype, device=device)
        if fit == count:
            return cls(on_device)
        like = torch.empty(count - fit, height, width, channels, dtype=dtype, device="meta")
        return cls(on_device, buffers.take(like))

    @property
    def device_bytes(self) -> int:
        return self._device.nbytes

    def frames(self, start: int, end: int, read: bool = True) -> torch.Tensor:
        """Frames [n, H, W, C] on the device: a view, or a copy that `store_frames` writes back.

        Args:
            read: False if all of it is going to be overwritten.
        """
        first = len(self._device)
        if self._host is None or end <= first:
            return self._device[start:end]
        part = torch.empty(end - start, *self._device.shape[1:], dtype=self.dtype, device=self.device)
        if read:
            inside = max(first - start, 0)
            part[:inside] = self._device[start : start + inside]
            part[inside:].copy_(self._host[max(start - first, 0) : end - first], non_blocking=True)
        return part

    def store_frames(self, start: int, end: int, part: torch.Tensor) -> None:
        """Write frames [n, H, W, C] back where `frames` returned a copy."""
        first = len(self._device)
        if self._host is None or end <= first:
            return
        inside = max(first - start, 0)
        self._device[start : start + inside] = part[:inside]
        self._host[max(start - first, 0) : end - first].copy_(part[inside:], non_blocking=True)

    def rows(self, start: int, end: int) -> torch.Tensor:
        """Rows of all frames [B, T, n, W, C] on the device: a view, or a copy that `store_rows` writes back."""
        if self._host is None:
            return self._device[:, start:end].unflatten(0, (-1, self.video_frames))
        count, channels, _, width = self.shape
        part = torch.empty(count, end - start, width, channels, dtype=self.dtype, device=self.device)
        first = len(self._device)
        part[:first] = self._device[:, start:end]
        for frame, held in enumerate(self._host, first):  # each is contiguous, so that a GPU copies it asynchronously
            part[frame].copy_(held[start:end], non_blocking=True)
        return part[None]

    def store_rows(self, start: int, end: int, part: torch.Tensor) -> None:
        """Write rows [B, T, n, W, C] back where `rows` returned a copy."""
        if self._host is None:
            return
        first = len(self._device)
        self._device[:, start:end] = part[0, :first]
        for frame, held in enumerate(self._host, first):
            held[start:end].copy_(part[0, frame], non_blocking=True)

    def read_chunks(self, ranges: Sequence[tuple[int, int]]) -> Iterator[torch.Tensor]:
        """The frames of each range [n, C, H, W], channels last."""
        for start, end in ranges:
            yield self.frames(start, end).permute(0, 3, 1, 2)
