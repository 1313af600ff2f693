"""Distance of an extension's weights from their initial values."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch

from . import positions
from .extension import Extension


@dataclass(frozen=True)
class Distance:
    """Relative distances of one block: norm of the difference, divided by the norm of the initial value.

    Attributes:
        positions: distance of the position table from the base's positions, continued in ping-pong order.
        convolution: distance of the kernel from the identity.
        weights: distance of the 30 tensors that base and extension share; None without a base.
    """

    positions: float
    convolution: float
    weights: float | None


def distances(extension: Extension, base: Iterable[Mapping[str, torch.Tensor]] | None = None) -> Iterator[Distance]:
    """Distance of each of the 16 blocks from the start of post-tuning (paper section 3.2).

    Args:
        base: the base's 30 temporal weights of each block, by their names under the SVD transformer.

    Yields:
        One distance per block, in the order of `Extension.blocks`.
    """
    base_blocks = iter(base) if base is not None else None
    for block in extension.blocks:
        frames, channels = block.positions.shape
        initial = positions.sinusoidal(positions.ping_pong(frames), channels)
        kernel = block.conv_weight.float().clone()
        kernel[:, :, 1, 1, 1].diagonal().sub_(1)
        weights = None
        if base_blocks is not None:
            base_weights = next(base_blocks)
            pairs = [(tensor.float(), base_weights[name].float()) for name, tensor in block.shared.items()]
            difference = sum((tuned - original).square().sum().item() for tuned, original in pairs)
            weights = (difference / sum(original.square().sum().item() for _, original in pairs)) ** 0.5
        yield Distance(
            ((block.positions.float() - initial).norm() / initial.norm()).item(),
            kernel.norm().item() / channels**0.5,
            weights,
        )
