"""The way into an extended temporal block: trained positions, then a 3-D convolution (paper section 3.2)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional


def reflect_pad(x: torch.Tensor) -> torch.Tensor:
    """Pad time, height and width by one on each side with their reflection, channels last.

    A dimension of size 1 has nothing to reflect to and is repeated (numpy's `pad(mode="reflect")` does the
    same), so that single frames and the smallest pictures work, where torch's padding raises.

    Args:
        x: [B, T, H, W, C].

    Returns:
        [B, T+2, H+2, W+2, C].
    """
    if x.requires_grad and torch.is_grad_enabled() and min(x.shape[1:4]) > 1:
        # torch's own gradient is 20 times faster than that of the copies below, whose forward is the faster one.
        channels_first = functional.pad(x.permute(0, 4, 1, 2, 3), (1,) * 6, mode="reflect")
        return channels_first.permute(0, 2, 3, 4, 1)
    batch, frames, height, width, channels = x.shape
    padded = x.new_empty(batch, frames + 2, height + 2, width + 2, channels)
    padded[:, 1:-1, 1:-1, 1:-1] = x
    for dim in (1, 2, 3):
        size = x.shape[dim]
        # Whole slices: a later dimension copies the borders that the earlier ones have filled.
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
    """conv(x + positions), the input and the residual of an extended temporal block.

    Reference: `TemporalAttentionBlock.forward` of DiffSynth's `svd_unet`, up to its first residual.

    Args:
        tokens: [B*T, H*W, C], B clips of T frames.
        positions: projected frame positions [T, C].
        conv: 3x3x3 convolution [B, C, T+2, H+2, W+2] -> [B, C, T, H, W], without padding of its own.

    Returns:
        [B*H*W, T, C], the order in which temporal attention reads.
    """
    frames, channels = positions.shape
    clips = tokens.reshape(-1, frames, height, width, channels) + positions[:, None, None]
    # Channels last in memory all the way: the permuted views below copy nothing.
    convolved = conv(reflect_pad(clips).permute(0, 4, 1, 2, 3))
    return convolved.permute(0, 3, 4, 2, 1).reshape(-1, frames, channels)


def padded_rows(
    clips: torch.Tensor, start: int, end: int, above: torch.Tensor | None, positions: torch.Tensor
) -> torch.Tensor:
    """What the 3x3x3 convolution reads to compute some rows: positions added, borders reflected as by `reflect_pad`.

    Args:
        clips: [B, T, H, W, C]; rows before `start` are not read.
        start, end: the rows to compute.
        above: row `start - 1` [B, T, W, C]; None for the first rows.
        positions: projected frame positions, added to every row [T, C].

    Returns:
        [B, T + 2, end - start + 2, W + 2, C].
    """
    batch, frames, height, width, channels = clips.shape
    padded = clips.new_empty(batch, frames + 2, end - start + 2, width + 2, channels)
    inner = padded[:, 1:-1, :, 1:-1]
    shift = positions[:, None]
    torch.add(clips[:, :, start:end], shift[:, None], out=inner[:, :, 1:-1])
    torch.add(clips[:, :, min(1, height - 1)] if above is None else above, shift, out=inner[:, :, 0])
    below = end if end < height else max(height - 2, 0)
    from_above = below < start and above is not None
    torch.add(above if from_above else clips[:, :, below], shift, out=inner[:, :, -1])
    padded[:, 1:-1, :, 0] = padded[:, 1:-1, :, min(2, width)]
    padded[:, 1:-1, :, -1] = padded[:, 1:-1, :, max(width - 1, 1)]
    padded[:, 0] = padded[:, min(2, frames)]
    padded[:, -1] = padded[:, max(frames - 1, 1)]
    return padded


def identity_convolution(channels: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The weights [C, C, 3, 3, 3] of a 3-D convolution that changes nothing: an extension's before its training."""
    weight = torch.zeros(channels, channels, 3, 3, 3, dtype=dtype)
    weight[:, :, 1, 1, 1].diagonal().fill_(1.0)
    return weight
