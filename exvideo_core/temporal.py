"""The way into an extended temporal block: trained positions, then a 3-D convolution (paper section 3.2)."""

from __future__ import annotations

from collections.abc import Callable

import torch


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
        channels_first = torch.nn.functional.pad(x.permute(0, 4, 1, 2, 3), (1,) * 6, mode="reflect")
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


def blended_convolution(weight: torch.Tensor, bias: torch.Tensor, strength: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The convolution's weights, moved towards identity where strength is below 1.

    Args:
        weight: [C, C, 3, 3, 3].
        bias: [C].
    """
    if strength == 1.0:
        return weight, bias
    blended = weight * strength
    blended[:, :, 1, 1, 1].diagonal().add_(1.0 - strength)
    return blended, bias * strength
