"""SVD's residual blocks and changes of size, in chunks of frames and, along time, of rows.

The UNet's and the VAE's blocks are the same two halves: one that looks at single frames, and one that looks along time
only, and so at single pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import Downsample, ResBlock, Upsample, VideoResBlock
from torch.nn import functional

from . import budget as chunks
from .cast_weights import Resident
from .frame_maps import FrameMaps
from .overrides import is_sum_of_its_parts
from .skip_connections import Joined
from .transformer_block import Moments, adopt, normalized, picture_norm


def _channels_last(shape: Sequence[int], like: torch.Tensor | Joined) -> torch.Tensor:
    """An empty [N, C, H, W] whose memory is [N, H, W, C]."""
    count, channels, height, width = shape
    return torch.empty(count, height, width, channels, dtype=like.dtype, device=like.device).permute(0, 3, 1, 2)


class Chunked(Protocol):
    """Pictures [N, C, H, W] that are read by frames, in order."""

    @property
    def shape(self) -> torch.Size: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def chunks(self, spans: Sequence[tuple[int, int]]) -> Iterator[torch.Tensor]:
        """The frames of each span, channels last."""
        ...


class Enlarged:
    """Pictures at another size (nearest neighbours) behind a 3x3 convolution, computed as they are read."""

    def __init__(self, x: Chunked, conv: torch.nn.Conv2d, size: tuple[int, int], weights: Resident) -> None:
        self._x, self._conv, self._size, self._weights = x, conv, size, weights
        self.shape = torch.Size((x.shape[0], conv.out_channels, *size))
        self.device, self.dtype = x.device, x.dtype

    def chunks(self, spans: Sequence[tuple[int, int]]) -> Iterator[torch.Tensor]:
        for part in self._x.chunks(spans):
            large = functional.interpolate(part, size=self._size, mode="nearest")
            yield self._weights.conv2d(self._conv, large)


def frames_residual(
    x: Chunked,
    first: tuple[torch.nn.GroupNorm, torch.nn.Conv2d],
    second: tuple[torch.nn.GroupNorm, torch.nn.Conv2d],
    shortcut: torch.nn.Conv2d | None,
    shift: torch.Tensor | None,
    weights: Resident,
    out: FrameMaps,
) -> None:
    """x + conv(silu(norm(conv(silu(norm(x))) + shift))), frame by frame.

    Args:
        x: [N, C, H, W].
        first, second: norm and convolution.
        shortcut: 1x1 convolution of x, where C' is not C.
        shift: added between the two [N, C'].
        out: where the result is written [N, C', H, W]; may be what `x` reads from.
    """
    count, channels, height, width = x.shape
    widest = max(channels, second[1].out_channels)
    spans = chunks.spans(count, height * width * 3 * widest * x.dtype.itemsize)
    (_, conv), (_, last) = first, second
    # A convolution's bias is a pass of its own on a GPU: added to what is added anyway.
    before, bias = weights.bias_of(conv), weights.bias_of(last)
    if shift is not None:
        shift, before = _sum(shift, before)[:, :, None, None], None
    fused = shortcut is not None and weights.owns(shortcut)
    if fused:
        weight, own = weights(shortcut)
        weight, own, bias = weight.flatten(1), _sum(own, bias), None
    for (start, end), part in zip(spans, x.chunks(spans), strict=True):
        hidden = _activated_convolution(part, *first, before, weights)
        if shift is not None:
            hidden.add_(shift[start:end])
        hidden = _activated_convolution(hidden, *second, bias, weights)
        if fused:
            part = functional.linear(part.permute(0, 2, 3, 1), weight, own).permute(0, 3, 1, 2)
        elif shortcut is not None:
            part = shortcut(part)
        place = out.frames(start, end, read=False)
        torch.add(hidden, part, out=place.permute(0, 3, 1, 2))
        out.store_frames(start, end, place)


def _activated_convolution(
    x: torch.Tensor, norm: torch.nn.GroupNorm, conv: torch.nn.Conv2d, bias: torch.Tensor | None, weights: Resident
) -> torch.Tensor:
    active = functional.silu(picture_norm(x, norm, weights), inplace=True)
    if bias is not None:
        return weights.conv2d(conv, active)
    return weights.without_bias(conv, active)


def _sum(first: torch.Tensor, second: torch.Tensor | None) -> torch.Tensor:
    return first if second is None else first + second


def add_time_residual(
    x: FrameMaps,
    stack: ResBlock,
    shift: torch.Tensor | None,
    share: torch.Tensor,
    weights: Resident,
    keep: bool = True,
) -> None:
    """x += share * f(x), in place, f being a temporal block without its own sum.

    The host mixes a x + (1 - a)(x + f(x)), which is x + (1 - a) f(x).

    Args:
        x: [B*T, C, H, W].
        stack: the block: group norms over all frames, and 3x1x1 convolutions.
        shift: added between the two convolutions [B*T, C].
        share: broadcast against [B, T, P, C].
        keep: hold what lies between the two convolutions, a tensor of x's size, while its moments are gathered;
            else it is computed twice.
    """
    (norm_in, _, conv_in), (norm_out, _, _, conv_out) = stack.in_layers, stack.out_layers
    count, channels, height, width = x.shape
    frames = x.clip_frames
    moments_in, moments_out = Moments(norm_in.num_groups), Moments(norm_out.num_groups)
    for start, end in chunks.spans(height, count * width * channels * 4):
        moments_in.add(x.rows(start, end).flatten(2, 3))
    bias = weights.bias_of(conv_in)
    if shift is not None:
        shift, bias = _sum(shift, bias).unflatten(0, (-1, frames))[:, :, None], None

    def first_half(rows: torch.Tensor) -> torch.Tensor:
        active = normalized(rows.flatten(2, 3), moments_in, norm_in, weights)
        changed = _along_time(functional.silu(active, inplace=True), conv_in, bias, weights)
        return changed if shift is None else changed.add_(shift)

    kept = (count // frames, frames, height, width, channels)
    hidden = torch.empty(kept, dtype=x.dtype, device=x.device) if keep else None
    spans = chunks.spans(height, count * width * channels * x.dtype.itemsize * 3)
    for start, end in spans:
        changed = first_half(x.rows(start, end))
        moments_out.add(changed)
        if hidden is not None:
            hidden[:, :, start:end] = changed.unflatten(2, (-1, width))
    for start, end in spans:
        rows = x.rows(start, end)
        part = first_half(rows) if hidden is None else hidden[:, :, start:end].flatten(2, 3)
        active = normalized(part, moments_out, norm_out, weights)
        changed = _along_time(functional.silu(active, inplace=True), conv_out, weights.bias_of(conv_out), weights)
        pixels = rows.flatten(2, 3)
        torch.addcmul(pixels, changed, share, out=pixels)
        x.store_rows(start, end, rows)


def _along_time(x: torch.Tensor, conv: torch.nn.Conv3d, bias: torch.Tensor | None, weights: Resident) -> torch.Tensor:
    """A 3x1x1 convolution, zeros beyond the ends. x: [B, T, P, C] -> [B, T, P, C']."""
    if not weights.owns(conv):
        return conv(x.permute(0, 3, 1, 2)[..., None])[..., 0].permute(0, 2, 3, 1)
    weight = weights(conv)[0].squeeze(-1)
    return functional.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=(1, 0)).permute(0, 2, 3, 1)


class BoundedResBlock(VideoResBlock):
    """The host's `VideoResBlock` with bounded intermediates; its input may be a `Joined`."""

    def __init__(self, base: VideoResBlock) -> None:
        adopt(self, base)

    def forward(
        self,
        x: torch.Tensor | Joined,
        emb: torch.Tensor,
        num_video_frames: int,
        image_only_indicator: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x [B*T, C, H, W], emb [B*T, E] -> [B*T, C', H, W], channels last."""
        weights = Resident(emb)
        if torch.is_grad_enabled() or not self._in_parts(weights):
            whole = x.whole() if isinstance(x, Joined) else x
            return super().forward(whole, emb, num_video_frames, image_only_indicator)
        active = functional.silu(emb)
        (norm_in, _, conv_in), (norm_out, _, _, conv_out) = self.in_layers, self.out_layers
        shortcut = None if isinstance(self.skip_connection, torch.nn.Identity) else self.skip_connection
        shift = weights.linear(self.emb_layers[1], active)
        joined = x if isinstance(x, Joined) else Joined([x])
        out = _channels_last((x.shape[0], self.out_channels, *x.shape[2:]), joined)
        maps = FrameMaps.of(out, num_video_frames)
        frames_residual(joined, (norm_in, conv_in), (norm_out, conv_out), shortcut, shift, weights, maps)
        if joined is x:
            joined.release()
        share = (1.0 - self.time_mixer.get_alpha(image_only_indicator, out.device)).to(out.dtype)
        share = share.squeeze(1) if share.ndim == 5 else share  # [B, 1, T, 1, 1] -> [B, T, 1, 1]
        shift = weights.linear(self.time_stack.emb_layers[1], active)
        add_time_residual(maps, self.time_stack, shift, share, weights)
        return out

    def _in_parts(self, weights: Resident) -> bool:
        """Whether the block may be computed in parts: norms along time have to see all of a clip."""
        stack = self.time_stack
        return is_sum_of_its_parts(stack) and weights.owns(stack.in_layers[0]) and weights.owns(stack.out_layers[0])


class BoundedUpsample(Upsample):
    """The host's `Upsample`, frame by frame."""

    def __init__(self, base: Upsample) -> None:
        adopt(self, base)

    def forward(self, x: torch.Tensor, output_shape: torch.Size | None = None) -> torch.Tensor:
        """x [N, C, H, W] -> [N, C', 2 H, 2 W] or the size of `output_shape`, channels last."""
        if torch.is_grad_enabled():
            return super().forward(x, output_shape)
        height, width = x.shape[-2:]
        size = (2 * height, 2 * width) if output_shape is None else (output_shape[-2], output_shape[-1])
        large = Enlarged(Joined([x]), self.conv, size, Resident(x))
        out = _channels_last(large.shape, x)
        spans = chunks.spans(len(x), math.prod(size) * x.shape[1] * x.element_size() * 2)
        for (start, end), part in zip(spans, large.chunks(spans), strict=True):
            out[start:end] = part
        return out


class BoundedDownsample(Downsample):
    """The host's `Downsample`, frame by frame."""

    def __init__(self, base: Downsample) -> None:
        adopt(self, base)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [N, C, H, W] -> [N, C', H/2, W/2], channels last."""
        if torch.is_grad_enabled():
            return super().forward(x)
        count, channels, height, width = x.shape
        weights = Resident(x)
        out = _channels_last((count, self.out_channels, (height + 1) // 2, (width + 1) // 2), x)
        for start, end in chunks.spans(count, height * width * channels * x.element_size() * 2):
            part = x[start:end].contiguous(memory_format=torch.channels_last)
            out[start:end] = weights.conv2d(self.op, part, stride=2)
        return out
