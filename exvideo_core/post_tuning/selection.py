"""Selects the trained weights, and creates the untrained extension."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..diffusers.names import TRANSFORMERS
from ..diffusers.patch import SHARED, base_weights, sizes
from ..method.extension import Extension

if TYPE_CHECKING:
    from diffusers import UNetSpatioTemporalConditionModel


def untrained(unet: UNetSpatioTemporalConditionModel, frames: int) -> Extension:
    """Create an extension for `frames` frames from a diffusers UNet's own weights, see `Extension.untrained`.

    Raises:
        ValueError: the UNet does not have SVD's layout.
    """
    return Extension.untrained(base_weights(unet), sizes(unet)[0], frames)


def select(
    unet: UNetSpatioTemporalConditionModel, positions: bool, convolution: bool, attention: bool
) -> dict[str, list[torch.nn.Parameter]]:
    """Freeze an extended UNet except for the selected parts of its extension.

    Args:
        unet: a UNet with an extension.
        positions: train the position tables.
        convolution: train the 3-D convolutions.
        attention: train all other weights of the temporal blocks (attention, feed-forward, norms, projection of
            positions).

    Returns:
        The trained parameters of each part, by "positions", "convolution" and "attention".
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
