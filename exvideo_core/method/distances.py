"""How far an extension has moved from where its training began."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch

from . import positions
from .extension import Extension


@dataclass(frozen=True)
class Distance:
    """Of one block, each relative: the norm of the difference by the norm of the start. 0 is untrained.

    Attributes:
        positions: of the table, from the base's own positions, past its 25 frames in ping-pong order.
        convolution: of the kernel, from the identity.
        weights: of the 30 tensors that base and extension share, together; None where no base is given.
    """

    positions: float
    convolution: float
    weights: float | None


def distances(extension: Extension, base: Iterable[Mapping[str, torch.Tensor]] | None = None) -> Iterator[Distance]:
    """The distance of each of the 16 blocks from the start of post-tuning (paper section 3.2), one after the other.

    Args:
        base: the base's 30 temporal weights of each block, by their names under the SVD transformer.
    """
    starts = iter(base) if base is not None else None
    for block in extension.blocks:
        frames, channels = block.positions.shape
        untrained = positions.sinusoidal(positions.ping_pong(frames), channels)
        kernel = block.conv_weight.float().clone()
        kernel[:, :, 1, 1, 1].diagonal().sub_(1)
        weights = None
        if starts is not None:
            start = next(starts)
            pairs = [(tensor.float(), start[name].float()) for name, tensor in block.shared.items()]
            moved = sum((tuned - original).square().sum().item() for tuned, original in pairs)
            weights = (moved / sum(original.square().sum().item() for _, original in pairs)) ** 0.5
        yield Distance(
            ((block.positions.float() - untrained).norm() / untrained.norm()).item(),
            kernel.norm().item() / channels**0.5,
            weights,
        )
