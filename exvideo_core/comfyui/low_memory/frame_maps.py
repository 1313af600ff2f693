"""Feature maps of a clip's frames, of which some can lie in host memory."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch

from .skip_connections import HostBuffers


class FrameMaps:
    """Feature maps [B*T, C, H, W] of B clips, channels last: the first frames on the device, the others in host memory.

    All that is computed with them is computed on the device, in the same order: where they lie changes no number.

    Args:
        on_device: the first frames [n, H, W, C], in one piece.
        in_host: the others [m, H, W, C], of a single clip.
        frames: of a clip (default: all are one clip's).
    """

    def __init__(self, on_device: torch.Tensor, in_host: torch.Tensor | None = None, frames: int | None = None) -> None:
        self._device, self._host = on_device, in_host
        height, width, channels = on_device.shape[1:]
        count = len(on_device) + (0 if in_host is None else len(in_host))
        self.shape = torch.Size((count, channels, height, width))
        self.device, self.dtype = on_device.device, on_device.dtype
        self.clip_frames = count if frames is None else frames
        assert in_host is None or self.clip_frames == count

    @classmethod
    def of(cls, x: torch.Tensor, frames: int) -> FrameMaps:
        """Those of a tensor [B*T, C, H, W] in channels-last memory, which they go on to share."""
        return cls(x.permute(0, 2, 3, 1), frames=frames)

    @classmethod
    def empty(
        cls, shape: Sequence[int], dtype: torch.dtype, device: torch.device, most: float, buffers: HostBuffers
    ) -> FrameMaps:
        """New ones of one clip, with at most so many bytes on the device.

        Args:
            shape: [T, C, H, W].
        """
        count, channels, height, width = shape
        each = channels * height * width * dtype.itemsize
        fit = count if math.isinf(most) else min(int(max(most, 0) // each), count)
        on_device = torch.empty(fit, height, width, channels, dtype=dtype, device=device)
        if fit == count:
            return cls(on_device)
        like = torch.empty(count - fit, height, width, channels, dtype=dtype, device="meta")
        return cls(on_device, buffers.take(like))

    @property
    def device_bytes(self) -> int:
        return self._device.nbytes

    def frames(self, start: int, end: int, read: bool = True) -> torch.Tensor:
        """Some frames [n, H, W, C] on the device: a view, or a copy that `store_frames` writes back.

        Args:
            read: False where all of it is going to be overwritten.
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
        first = len(self._device)
        if self._host is None or end <= first:
            return
        inside = max(first - start, 0)
        self._device[start : start + inside] = part[:inside]
        self._host[max(start - first, 0) : end - first].copy_(part[inside:], non_blocking=True)

    def rows(self, start: int, end: int) -> torch.Tensor:
        """Some rows of all frames [B, T, n, W, C] on the device: a view, or a copy that `store_rows` writes back."""
        if self._host is None:
            return self._device[:, start:end].unflatten(0, (-1, self.clip_frames))
        count, channels, _, width = self.shape
        part = torch.empty(count, end - start, width, channels, dtype=self.dtype, device=self.device)
        first = len(self._device)
        part[:first] = self._device[:, start:end]
        for frame, held in enumerate(self._host, first):  # each is one piece of memory, which a GPU copies by itself
            part[frame].copy_(held[start:end], non_blocking=True)
        return part[None]

    def store_rows(self, start: int, end: int, part: torch.Tensor) -> None:
        if self._host is None:
            return
        first = len(self._device)
        self._device[:, start:end] = part[0, :first]
        for frame, held in enumerate(self._host, first):
            held[start:end].copy_(part[0, frame], non_blocking=True)

    def chunks(self, spans: Sequence[tuple[int, int]]) -> Iterator[torch.Tensor]:
        """The frames of each span [n, C, H, W], channels last."""
        for start, end in spans:
            yield self.frames(start, end).permute(0, 3, 1, 2)
