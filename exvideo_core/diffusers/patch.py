"""The extension on diffusers' `UNetSpatioTemporalConditionModel`, for sampling and for training."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from diffusers import UNetSpatioTemporalConditionModel
from diffusers.models.transformers.transformer_temporal import TransformerSpatioTemporalModel

from ..choices import PositionMode
from ..method import tensor_names
from ..method.convolution import positional_convolution
from ..method.extension import BlockWeights, Extension
from ..method.positions import table_for
from .names import TRANSFORMERS


def _shared_names() -> dict[str, str]:
    """Name under the SVD transformer -> under diffusers' transformer, for the 30 tensors of a block."""
    return {
        svd: svd.replace("time_stack.0", "temporal_transformer_blocks.0")
        .replace("time_pos_embed.0", "time_pos_embed.linear_1")
        .replace("time_pos_embed.2", "time_pos_embed.linear_2")
        for svd in tensor_names.SHARED_TENSORS.values()
    }


#: Name under the SVD transformer -> under diffusers' transformer.
SHARED: Mapping[str, str] = _shared_names()

#: An extension's parameters by their names in an extended UNet.
EXTENSION_PARAMETERS = frozenset(
    f"{transformer}.{name}"
    for transformer in TRANSFORMERS
    for name in ("positions", "positional_conv.weight", "positional_conv.bias", *SHARED.values())
)


class ExtendedTransformer(TransformerSpatioTemporalModel):
    """diffusers' spatio-temporal transformer with a position table and a 3-D convolution (paper section 3.2).

    Shares every module of the transformer that it replaces and adds the parameters `positions` [F, C] and
    `positional_conv`. The temporal block reads, and adds its result to, `conv(x + time_pos_embed(table[frame]))`.
    """

    def __init__(self, base: TransformerSpatioTemporalModel, weights: BlockWeights, mode: PositionMode) -> None:
        torch.nn.Module.__init__(self)
        for name, module in base.named_children():
            self.add_module(name, module)
        self.in_channels = base.in_channels
        self.gradient_checkpointing = base.gradient_checkpointing
        like = base.proj_in.weight
        channels = weights.conv_bias.shape[0]
        self.mode = mode
        self.positions = torch.nn.Parameter(weights.positions.to(like, copy=True))
        self.positional_conv = torch.nn.Conv3d(channels, channels, 3)
        self.positional_conv.weight = torch.nn.Parameter(weights.conv_weight.to(like, copy=True))
        self.positional_conv.bias = torch.nn.Parameter(weights.conv_bias.to(like, copy=True))

    def _checkpointed(self, module: torch.nn.Module, *arguments: object) -> torch.Tensor:
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(module, *arguments)
        return module(*arguments)

    def forward(  # noqa: D102 - the base's contract
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        image_only_indicator: torch.Tensor,
        return_dict: bool = True,  # noqa: ARG002 - as in the base, whose callers ask for a tuple
    ) -> tuple[torch.Tensor]:
        height, width = hidden_states.shape[-2:]
        frames = image_only_indicator.shape[-1]
        # Every place of a clip reads the clip's own image embedding, which is the same for all its frames.
        time_context = encoder_hidden_states[::frames].repeat_interleave(height * width, dim=0)
        tokens = self.norm(hidden_states).flatten(2).transpose(1, 2)
        tokens = self.proj_in(tokens)
        shift = self.time_pos_embed(table_for(self.positions, frames, self.mode).to(tokens.dtype))
        for spatial, temporal in zip(self.transformer_blocks, self.temporal_transformer_blocks, strict=True):
            tokens = self._checkpointed(spatial, tokens, None, encoder_hidden_states, None)
            sequences = positional_convolution(tokens, shift, self.positional_conv, height, width)
            moving = sequences.unflatten(0, (-1, height * width)).transpose(1, 2).flatten(0, 1)
            moving = self._checkpointed(temporal, moving, frames, time_context)
            tokens = self.time_mixer(x_spatial=tokens, x_temporal=moving, image_only_indicator=image_only_indicator)
        tokens = self.proj_out(tokens)
        return (tokens.transpose(1, 2).unflatten(2, (height, width)) + hidden_states,)


def transformers_of(unet: UNetSpatioTemporalConditionModel) -> list[TransformerSpatioTemporalModel]:
    """The 16 transformers in the order of an extension's blocks.

    Raises:
        ValueError: the model is no SVD UNet of four levels with two layers each.
    """
    try:
        return [unet.get_submodule(name) for name in TRANSFORMERS]
    except AttributeError as error:
        raise ValueError(f"This UNet does not have SVD's layout ({error}), so no extension fits it.") from error


def base_weights(unet: UNetSpatioTemporalConditionModel) -> list[dict[str, torch.Tensor]]:
    """The 30 temporal weights of each transformer, by their names under the SVD transformer."""
    found = []
    for transformer in transformers_of(unet):
        state = transformer.state_dict()
        found.append({svd: state[ours] for svd, ours in SHARED.items()})
    return found


def sizes(unet: UNetSpatioTemporalConditionModel) -> tuple[list[int], int]:
    """Channels of the 16 transformers, and the width of the image embedding that they read."""
    targets = transformers_of(unet)
    context = targets[0].temporal_transformer_blocks[0].attn2.to_k.weight.shape[1]
    return [target.in_channels for target in targets], context


def is_extended(unet: UNetSpatioTemporalConditionModel) -> bool:
    return isinstance(transformers_of(unet)[0], ExtendedTransformer)


def apply(
    unet: UNetSpatioTemporalConditionModel,
    extension: Extension,
    mode: PositionMode = "trained",
) -> None:
    """Put an extension into a UNet, in place: its 16 transformers' temporal weights, tables and convolutions.

    Raises:
        ValueError: the extension does not fit, or the UNet carries one already.
    """
    targets = transformers_of(unet)
    if is_extended(unet):
        raise ValueError("This UNet already has an extension. Load the base model again.")
    extension.check_fits(*sizes(unet))
    for name, target, weights in zip(TRANSFORMERS, targets, extension.blocks, strict=True):
        extended = ExtendedTransformer(target, weights, mode)
        state = {ours: weights.shared[svd] for svd, ours in SHARED.items()}
        with torch.no_grad():
            for parameter_name, value in state.items():
                extended.get_parameter(parameter_name).copy_(value)
        owner, _, index = name.rpartition(".")
        unet.get_submodule(owner)[int(index)] = extended


def collect(unet: UNetSpatioTemporalConditionModel, state: Mapping[str, torch.Tensor] | None = None) -> Extension:
    """The extension that a UNet carries.

    Args:
        state: the UNet's tensors by name, where they are not the module's own (a moving average, gathered shards).
    """
    state = unet.state_dict() if state is None else state
    blocks = [
        BlockWeights(
            positions=state[f"{name}.positions"],
            conv_weight=state[f"{name}.positional_conv.weight"],
            conv_bias=state[f"{name}.positional_conv.bias"],
            shared={svd: state[f"{name}.{ours}"] for svd, ours in SHARED.items()},
        )
        for name in TRANSFORMERS
    ]
    return Extension("trained", tuple(blocks))
