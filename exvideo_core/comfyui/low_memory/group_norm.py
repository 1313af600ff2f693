"""Group norms, of single frames or over all frames of a video, whose statistics are gathered chunk by chunk."""

from __future__ import annotations

import torch
from torch.nn import functional

from .cast_weights import Affine, CastWeights


def frame_group_norm(x: torch.Tensor, norm: torch.nn.GroupNorm, weights: CastWeights) -> torch.Tensor:
    """Group norm of single frames [N, C, H, W], channels last."""
    if not weights.is_plain(norm):
        return norm(x)
    if x.dtype == torch.float32:
        if x.shape[2] * x.shape[3] == 1:
            # Groups of a single value, as in narrow models, have no variance, and PyTorch's CPU kernel for
            # channels-last tensors amplifies rounding errors a thousandfold there.
            x = x.flatten(1)[..., None, None]
        return functional.group_norm(x, norm.num_groups, *weights(norm), norm.eps)
    # PyTorch's GPU kernel would copy the frames to channels first, and the convolution after it back.
    pixels = x.permute(0, 2, 3, 1)
    statistics = GroupStatistics(norm.num_groups)
    statistics.add(pixels)
    return apply_group_norm(pixels, statistics, norm, weights).permute(0, 3, 1, 2)


class GroupStatistics:
    """Mean and variance of the channel groups of each item of a batch, gathered chunk by chunk.

    Chunks are merged as in Chan et al. (1979), which avoids cancellation.
    """

    def __init__(self, groups: int) -> None:
        self._groups = groups
        self._count = 0
        self._mean = self._squares = torch.zeros(())  # replaced by the first chunk's

    def add(self, chunk: torch.Tensor) -> None:
        """Add a chunk of each of B videos or frames, channels last [B, T, P, C]."""
        each = chunk.shape[1] * chunk.shape[2]
        means = chunk.mean((1, 2), dtype=torch.float32).unflatten(-1, (self._groups, -1))
        mean = means.mean(-1)
        added = each * means.shape[-1]
        if chunk.dtype == torch.float32:
            # Mean first, then deviations: PyTorch's own var_mean takes seven times as long on a CPU.
            deviations = (chunk - means.flatten(1)[:, None, None]).square_().sum((1, 2))
            between = (means - mean[..., None]).square().sum(-1) * each
            squares = deviations.unflatten(-1, (self._groups, -1)).sum(-1) + between
        else:
            # What float32 loses in this difference is far below half precision, and the chunk is never copied.
            norms = torch.linalg.vector_norm(chunk, 2, (1, 2), dtype=torch.float32).square_()
            squares = norms.unflatten(-1, (self._groups, -1)).sum(-1)
            squares = squares.addcmul_(mean, mean, value=-added).clamp_(min=0.0)
        if self._count == 0:
            self._mean, self._squares, self._count = mean, squares, added
            return
        total = self._count + added
        step = mean - self._mean
        self._mean = mean - step * (self._count / total)
        self._squares = self._squares + squares + step.square() * (self._count * added / total)
        self._count = total

    def mean_and_variance(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and biased variance of every group, each [B, G, 1] in float32."""
        return self._mean[..., None], (self._squares / self._count)[..., None]


def apply_group_norm(
    x: torch.Tensor, statistics: GroupStatistics, norm: torch.nn.GroupNorm, weights: CastWeights
) -> torch.Tensor:
    """Group norm with given statistics, in float32 and rounded once: [B, T, P, C] -> contiguous [B, T, P, C]."""
    mean, variance = statistics.mean_and_variance()
    weight, bias = (value.float().unflatten(0, (norm.num_groups, -1)) for value in _affine(weights(norm)))
    scale = (variance + norm.eps).rsqrt_() * weight
    shift = torch.addcmul(bias, mean, scale, value=-1)
    scale, shift = (value.flatten(1)[:, None, None] for value in (scale, shift))
    return torch.addcmul(shift, x, scale, out=torch.empty(x.shape, dtype=x.dtype, device=x.device))


def _affine(weights: Affine) -> tuple[torch.Tensor, torch.Tensor]:
    weight, bias = weights
    assert bias is not None  # SVD's norms have one
    return weight, bias
