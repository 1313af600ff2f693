"""The input of an extended temporal block: trained positions and a 3-D convolution (paper section 3.2)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional


def reflect_pad(x: torch.Tensor) -> torch.Tensor:
    """Reflect-pad time, height and width by one on each side, channels last.

    A dimension of size 1 is repeated, as in numpy's `pad(mode="reflect")`; PyTorch's padding raises an error instead.

    Args:
        x: [B, T, H, W, C].

    Returns:
        [B, T+2, H+2, W+2, C].
    """
    if x.requires_grad and torch.is_grad_enabled() and min(x.shape[1:4]) > 1:
        # The gradient of PyTorch's padding is 20 times faster than that of the copies below, its forward is slower.
        channels_first = functional.pad(x.permute(0, 4, 1, 2, 3), (1,) * 6, mode="reflect")
        return channels_first.permute(0, 2, 3, 4, 1)
    batch, frames, height, width, channels = x.shape
    padded = x.new_empty(batch, frames + 2, height + 2, width + 2, channels)
    padded[:, 1:-1, 1:-1, 1:-1] = x
    for dim in (1, 2, 3):
        size = x.shape[dim]
        # Whole slices, so that later dimensions copy the borders that earlier ones have filled.
        padded.select(dim, 0).copy_(padded.select(dim, min(2, size)))
        padded.select(dim, size + 1).copy_(padded.select(dim, max(size - 1, 1)))
    return padded


def positional_convolution(
    tokens: torch.Tensor,
    positions: torch.Tensor,
    conv: Callable[[torch.Tensor], torch.Tensor],
    height: int,
    width: int,
) -> torch.Tensor:
    """conv(x + positions): the input and the residual of an extended temporal block.

    Reference: `TemporalAttentionBlock.forward` of DiffSynth's `svd_unet`, up to its first residual.

    Args:
        tokens: B videos of T frames [B*T, H*W, C].
        positions: projected frame positions [T, C].
        conv: 3x3x3 convolution [B, C, T+2, H+2, W+2] -> [B, C, T, H, W], without padding.

    Returns:
        [B*H*W, T, C], the layout of temporal attention.
    """
    frames, channels = positions.shape
    videos = tokens.reshape(-1, frames, height, width, channels) + positions[:, None, None]
    # Memory stays in channels-last order, so that the permutations below copy nothing.
    convolved = conv(reflect_pad(videos).permute(0, 4, 1, 2, 3))
    return convolved.permute(0, 3, 4, 2, 1).reshape(-1, frames, channels)


def padded_rows(
    videos: torch.Tensor, start: int, end: int, above: torch.Tensor | None, positions: torch.Tensor
) -> torch.Tensor:
    """Padded input of the 3x3x3 convolution for some of the rows: positions added, borders as in `reflect_pad`.

    Args:
        videos: [B, T, H, W, C]; rows before `start` are not read.
        start, end: the rows to compute.
        above: row `start - 1` [B, T, W, C]; None if `start` is 0.
        positions: projected frame positions, added to every row [T, C].

    Returns:
        [B, T + 2, end - start + 2, W + 2, C].
    """
    batch, frames, height, width, channels = videos.shape
    padded = videos.new_empty(batch, frames + 2, end - start + 2, width + 2, channels)
    inner = padded[:, 1:-1, :, 1:-1]
    shift = positions[:, None]
    torch.add(videos[:, :, start:end], shift[:, None], out=inner[:, :, 1:-1])
    torch.add(videos[:, :, min(1, height - 1)] if above is None else above, shift, out=inner[:, :, 0])
    below = end if end < height else max(height - 2, 0)
    from_above = below < start and above is not None
    torch.add(above if from_above else videos[:, :, below], shift, out=inner[:, :, -1])
    padded[:, 1:-1, :, 0] = padded[:, 1:-1, :, min(2, width)]
    padded[:, 1:-1, :, -1] = padded[:, 1:-1, :, max(width - 1, 1)]
    padded[:, 0] = padded[:, min(2, frames)]
    padded[:, -1] = padded[:, max(frames - 1, 1)]
    return padded


def identity_convolution(channels: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Weights [C, C, 3, 3, 3] of an identity convolution, from which post-tuning starts."""
    weight = torch.zeros(channels, channels, 3, 3, 3, dtype=dtype)
    weight[:, :, 1, 1, 1].diagonal().fill_(1.0)
    return weight
