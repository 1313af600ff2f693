"""Which weights are trained, and the untrained extension they start from."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..diffusers.names import TRANSFORMERS
from ..diffusers.patch import SHARED, base_weights, sizes
from ..method.extension import Extension

if TYPE_CHECKING:
    from diffusers import UNetSpatioTemporalConditionModel


def untrained(unet: UNetSpatioTemporalConditionModel, frames: int) -> Extension:
    """An extension of `frames` frames that leaves a diffusers SVD as it is within its own length.

    See `Extension.untrained`.
    """
    return Extension.untrained(base_weights(unet), sizes(unet)[0], frames)


def select(
    unet: UNetSpatioTemporalConditionModel, positions: bool, convolution: bool, attention: bool
) -> dict[str, list[torch.nn.Parameter]]:
    """Freeze all of an extended UNet but the chosen parts of its extension.

    Args:
        positions: the tables. convolution: the 3-D convolutions. attention: everything else of the temporal
            blocks (attention, feed-forward, norms, the projection of positions).

    Returns:
        The trained parameters of each part: "positions", "convolution", "attention".
    """
    unet.requires_grad_(False)
    parts: dict[str, list[torch.nn.Parameter]] = {"positions": [], "convolution": [], "attention": []}
    for name in TRANSFORMERS:
        transformer = unet.get_submodule(name)
        if positions:
            parts["positions"].append(transformer.positions)
        if convolution:
            parts["convolution"] += transformer.positional_conv.parameters()
        if attention:
            parts["attention"] += [transformer.get_parameter(ours) for ours in SHARED.values()]
    for part in parts.values():
        for parameter in part:
            parameter.requires_grad_(True)
    return parts
