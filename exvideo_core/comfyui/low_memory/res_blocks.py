"""SVD's residual blocks, upsampling and downsampling: chunks of frames in space, chunks of rows along time.

The UNet's and the VAE's blocks share two halves: a spatial one, which looks at single frames, and a temporal one, which
looks along time only, and so at single pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import Downsample, ResBlock, Upsample, VideoResBlock
from torch.nn import functional

from ..model import share_submodules
from .budget import chunk_ranges
from .cast_weights import CastWeights
from .frame_maps import FrameMaps
from .group_norm import GroupStatistics, apply_group_norm, frame_group_norm
from .overrides import is_plain_block
from .skip_connections import LazyConcat


class FrameReader(Protocol):
    """Feature maps [N, C, H, W] that are read by frames, in order."""

    @property
    def shape(self) -> torch.Size: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def read_chunks(self, ranges: Sequence[tuple[int, int]]) -> Iterator[torch.Tensor]:
        """The frames of each range [n, C, H, W], channels last."""
        ...


class UpsampledFrames:
    """Feature maps upsampled to `size` (nearest neighbor) and convolved (3x3), computed as they are read."""

    def __init__(self, x: FrameReader, conv: torch.nn.Conv2d, size: tuple[int, int], weights: CastWeights) -> None:
        self._x, self._conv, self._size, self._weights = x, conv, size, weights
        self.shape = torch.Size((x.shape[0], conv.out_channels, *size))
        self.device, self.dtype = x.device, x.dtype

    def read_chunks(self, ranges: Sequence[tuple[int, int]]) -> Iterator[torch.Tensor]:
        for part in self._x.read_chunks(ranges):
            upsampled = functional.interpolate(part, size=self._size, mode="nearest")
            yield self._weights.conv2d(self._conv, upsampled)


class ChunkedResBlock(VideoResBlock):
    """ComfyUI's `VideoResBlock` with bounded intermediates; its input may be a `LazyConcat`."""

    def __init__(self, base: VideoResBlock) -> None:
        share_submodules(self, base)

    def forward(
        self,
        x: torch.Tensor | LazyConcat,
        emb: torch.Tensor,
        num_video_frames: int,
        image_only_indicator: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x [B*T, C, H, W], emb [B*T, E] -> [B*T, C', H, W], channels last."""
        weights = CastWeights(emb)
        if torch.is_grad_enabled() or not self._is_chunkable(weights):
            whole = x.whole() if isinstance(x, LazyConcat) else x
            return super().forward(whole, emb, num_video_frames, image_only_indicator)
        active = functional.silu(emb)
        (norm_in, _, conv_in), (norm_out, _, _, conv_out) = self.in_layers, self.out_layers
        shortcut = None if isinstance(self.skip_connection, torch.nn.Identity) else self.skip_connection
        shift = weights.linear(self.emb_layers[1], active)
        joined = x if isinstance(x, LazyConcat) else LazyConcat([x])
        out = _empty_channels_last((x.shape[0], self.out_channels, *x.shape[2:]), joined)
        maps = FrameMaps.of(out, num_video_frames)
        add_spatial_residual(joined, (norm_in, conv_in), (norm_out, conv_out), shortcut, shift, weights, maps)
        if joined is x:
            joined.release()
        factor = (1.0 - self.time_mixer.get_alpha(image_only_indicator, out.device)).to(out.dtype)
        factor = factor.squeeze(1) if factor.ndim == 5 else factor  # [B, 1, T, 1, 1] -> [B, T, 1, 1]
        shift = weights.linear(self.time_stack.emb_layers[1], active)
        add_temporal_residual(maps, self.time_stack, shift, factor, weights)
        return out

    def _is_chunkable(self, weights: CastWeights) -> bool:
        """Whether the block may be computed in chunks: modified norms along time have to see the whole video."""
        stack = self.time_stack
        return is_plain_block(stack) and weights.is_plain(stack.in_layers[0]) and weights.is_plain(stack.out_layers[0])


class ChunkedUpsample(Upsample):
    """ComfyUI's `Upsample`, in chunks of frames."""

    def __init__(self, base: Upsample) -> None:
        share_submodules(self, base)

    def forward(self, x: torch.Tensor, output_shape: torch.Size | None = None) -> torch.Tensor:
        """x [N, C, H, W] -> [N, C', 2 H, 2 W], or the size of `output_shape`, channels last."""
        if torch.is_grad_enabled():
            return super().forward(x, output_shape)
        height, width = x.shape[-2:]
        size = (2 * height, 2 * width) if output_shape is None else (output_shape[-2], output_shape[-1])
        upsampled = UpsampledFrames(LazyConcat([x]), self.conv, size, CastWeights(x))
        out = _empty_channels_last(upsampled.shape, x)
        ranges = chunk_ranges(len(x), math.prod(size) * x.shape[1] * x.element_size() * 2)
        for (start, end), part in zip(ranges, upsampled.read_chunks(ranges), strict=True):
            out[start:end] = part
        return out


class ChunkedDownsample(Downsample):
    """ComfyUI's `Downsample`, in chunks of frames."""

    def __init__(self, base: Downsample) -> None:
        share_submodules(self, base)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [N, C, H, W] -> [N, C', H/2, W/2], channels last."""
        if torch.is_grad_enabled():
            return super().forward(x)
        count, channels, height, width = x.shape
        weights = CastWeights(x)
        out = _empty_channels_last((count, self.out_channels, (height + 1) // 2, (width + 1) // 2), x)
        for start, end in chunk_ranges(count, height * width * channels * x.element_size() * 2):
            part = x[start:end].contiguous(memory_format=torch.channels_last)
            out[start:end] = weights.conv2d(self.op, part, stride=2)
        return out


def add_spatial_residual(
    x: FrameReader,
    first: tuple[torch.nn.GroupNorm, torch.nn.Conv2d],
    second: tuple[torch.nn.GroupNorm, torch.nn.Conv2d],
    shortcut: torch.nn.Conv2d | None,
    shift: torch.Tensor | None,
    weights: CastWeights,
    out: FrameMaps,
) -> None:
    """out = x + conv(silu(norm(conv(silu(norm(x))) + shift))), in chunks of frames.

    Args:
        x: [N, C, H, W].
        first, second: norm and convolution of each half.
        shortcut: 1x1 convolution of x, if C' is not C.
        shift: added between the halves [N, C'].
        out: receives the result [N, C', H, W]; may be what `x` reads from.
    """
    count, channels, height, width = x.shape
    widest = max(channels, second[1].out_channels)
    ranges = chunk_ranges(count, height * width * 3 * widest * x.dtype.itemsize)
    (_, conv), (_, last) = first, second
    # On a GPU, adding a convolution's bias is a separate pass, so it is merged into another addition.
    first_bias, bias = weights.bias_of(conv), weights.bias_of(last)
    if shift is not None:
        shift, first_bias = _add(shift, first_bias)[:, :, None, None], None
    plain_shortcut = shortcut is not None and weights.is_plain(shortcut)
    if plain_shortcut:
        weight, shortcut_bias = weights(shortcut)
        weight, shortcut_bias, bias = weight.flatten(1), _add(shortcut_bias, bias), None
    for (start, end), part in zip(ranges, x.read_chunks(ranges), strict=True):
        hidden = _norm_silu_conv(part, *first, first_bias, weights)
        if shift is not None:
            hidden.add_(shift[start:end])
        hidden = _norm_silu_conv(hidden, *second, bias, weights)
        if plain_shortcut:
            part = functional.linear(part.permute(0, 2, 3, 1), weight, shortcut_bias).permute(0, 3, 1, 2)
        elif shortcut is not None:
            part = shortcut(part)
        target = out.frames(start, end, read=False)
        torch.add(hidden, part, out=target.permute(0, 3, 1, 2))
        out.store_frames(start, end, target)


def add_temporal_residual(
    x: FrameMaps,
    stack: ResBlock,
    shift: torch.Tensor | None,
    factor: torch.Tensor,
    weights: CastWeights,
    keep: bool = True,
) -> None:
    """x += factor * f(x), in place and in chunks of rows, f being a temporal block without its own residual.

    ComfyUI mixes a x + (1 - a)(x + f(x)), which is x + (1 - a) f(x).

    Args:
        x: [B*T, C, H, W].
        stack: the block: group norms over all frames, and 3x1x1 convolutions.
        shift: added between the two convolutions [B*T, C].
        factor: broadcast against [B, T, P, C].
        keep: keep the tensor between the two convolutions, of x's size, while its statistics are gathered; otherwise it
            is computed twice.
    """
    (norm_in, _, conv_in), (norm_out, _, _, conv_out) = stack.in_layers, stack.out_layers
    count, channels, height, width = x.shape
    frames = x.video_frames
    statistics_in, statistics_out = GroupStatistics(norm_in.num_groups), GroupStatistics(norm_out.num_groups)
    for start, end in chunk_ranges(height, count * width * channels * 4):
        statistics_in.add(x.rows(start, end).flatten(2, 3))
    bias = weights.bias_of(conv_in)
    if shift is not None:
        shift, bias = _add(shift, bias).unflatten(0, (-1, frames))[:, :, None], None

    def first_half(rows: torch.Tensor) -> torch.Tensor:
        active = apply_group_norm(rows.flatten(2, 3), statistics_in, norm_in, weights)
        out = _temporal_convolution(functional.silu(active, inplace=True), conv_in, bias, weights)
        return out if shift is None else out.add_(shift)

    shape = (count // frames, frames, height, width, channels)
    hidden = torch.empty(shape, dtype=x.dtype, device=x.device) if keep else None
    ranges = chunk_ranges(height, count * width * channels * x.dtype.itemsize * 3)
    for start, end in ranges:
        part = first_half(x.rows(start, end))
        statistics_out.add(part)
        if hidden is not None:
            hidden[:, :, start:end] = part.unflatten(2, (-1, width))
    for start, end in ranges:
        rows = x.rows(start, end)
        part = first_half(rows) if hidden is None else hidden[:, :, start:end].flatten(2, 3)
        active = apply_group_norm(part, statistics_out, norm_out, weights)
        bias_out = weights.bias_of(conv_out)
        out = _temporal_convolution(functional.silu(active, inplace=True), conv_out, bias_out, weights)
        pixels = rows.flatten(2, 3)
        torch.addcmul(pixels, out, factor, out=pixels)
        x.store_rows(start, end, rows)


def _norm_silu_conv(
    x: torch.Tensor, norm: torch.nn.GroupNorm, conv: torch.nn.Conv2d, bias: torch.Tensor | None, weights: CastWeights
) -> torch.Tensor:
    """conv(silu(norm(x))); without the convolution's bias if `bias` is None, because the caller adds it."""
    active = functional.silu(frame_group_norm(x, norm, weights), inplace=True)
    if bias is not None:
        return weights.conv2d(conv, active)
    return weights.conv2d_without_bias(conv, active)


def _temporal_convolution(
    x: torch.Tensor, conv: torch.nn.Conv3d, bias: torch.Tensor | None, weights: CastWeights
) -> torch.Tensor:
    """A 3x1x1 convolution with zero padding. x: [B, T, P, C] -> [B, T, P, C']."""
    if not weights.is_plain(conv):
        return conv(x.permute(0, 3, 1, 2)[..., None])[..., 0].permute(0, 2, 3, 1)
    weight = weights(conv)[0].squeeze(-1)
    return functional.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=(1, 0)).permute(0, 2, 3, 1)


def _add(first: torch.Tensor, second: torch.Tensor | None) -> torch.Tensor:
    return first if second is None else first + second


def _empty_channels_last(shape: Sequence[int], like: torch.Tensor | LazyConcat) -> torch.Tensor:
    """An empty [N, C, H, W] whose memory is [N, H, W, C]."""
    count, channels, height, width = shape
    return torch.empty(count, height, width, channels, dtype=like.dtype, device=like.device).permute(0, 3, 1, 2)
