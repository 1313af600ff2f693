"""Applies an extension to diffusers' `UNetSpatioTemporalConditionModel`, for inference and training."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from diffusers import UNetSpatioTemporalConditionModel
from diffusers.models.transformers.transformer_temporal import TransformerSpatioTemporalModel

from ..choices import PositionMode
from ..method import tensor_names
from ..method.convolution import positional_convolution
from ..method.extension import BlockWeights, Extension, FewSteps
from ..method.positions import table_for
from .names import TRANSFORMERS


def _shared_names() -> dict[str, str]:
    """Build `SHARED`."""
    return {
        svd: svd.replace("time_stack.0", "temporal_transformer_blocks.0")
        .replace("time_pos_embed.0", "time_pos_embed.linear_1")
        .replace("time_pos_embed.2", "time_pos_embed.linear_2")
        for svd in tensor_names.SHARED_TENSORS.values()
    }


#: Name under the SVD transformer -> name under diffusers' transformer, for the 30 tensors of a block.
SHARED: Mapping[str, str] = _shared_names()

#: Names of an extension's parameters in an extended UNet.
EXTENSION_PARAMETERS = frozenset(
    f"{transformer}.{name}"
    for transformer in TRANSFORMERS
    for name in ("positions", "positional_conv.weight", "positional_conv.bias", *SHARED.values())
)


class ExtendedTransformer(TransformerSpatioTemporalModel):
    """diffusers' spatio-temporal transformer with a position table and a 3-D convolution (paper section 3.2).

    Shares all modules of the transformer that it replaces and adds the parameters `positions` [F, C] and
    `positional_conv`. Input and residual of the temporal block are `conv(x + time_pos_embed(positions))`.

    Args:
        base: the transformer to replace.
        weights: weights of the extension's block.
        mode: how trained positions are assigned to frames, see `positions.table_for`.
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

    def _checkpointed(self, module: torch.nn.Module, *args: object) -> torch.Tensor:
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(module, *args)
        return module(*args)

    def forward(  # noqa: D102 - as in the base class
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        image_only_indicator: torch.Tensor,
        return_dict: bool = True,  # noqa: ARG002 - diffusers always asks for a tuple
    ) -> tuple[torch.Tensor]:
        height, width = hidden_states.shape[-2:]
        frames = image_only_indicator.shape[-1]
        # All pixels of a video attend to its image embedding, which is the same for all frames.
        time_context = encoder_hidden_states[::frames].repeat_interleave(height * width, dim=0)
        tokens = self.norm(hidden_states).flatten(2).transpose(1, 2)
        tokens = self.proj_in(tokens)
        shift = self.time_pos_embed(table_for(self.positions, frames, self.mode).to(tokens.dtype))
        for spatial, temporal in zip(self.transformer_blocks, self.temporal_transformer_blocks, strict=True):
            tokens = self._checkpointed(spatial, tokens, None, encoder_hidden_states, None)
            sequences = positional_convolution(tokens, shift, self.positional_conv, height, width)
            by_frame = sequences.unflatten(0, (-1, height * width)).transpose(1, 2).flatten(0, 1)
            by_frame = self._checkpointed(temporal, by_frame, frames, time_context)
            tokens = self.time_mixer(x_spatial=tokens, x_temporal=by_frame, image_only_indicator=image_only_indicator)
        tokens = self.proj_out(tokens)
        return (tokens.transpose(1, 2).unflatten(2, (height, width)) + hidden_states,)


def find_transformers(unet: UNetSpatioTemporalConditionModel) -> list[TransformerSpatioTemporalModel]:
    """The UNet's 16 transformers, in the order of an extension's blocks.

    Raises:
        ValueError: the UNet does not have SVD's layout of four levels with two layers each.
    """
    try:
        return [unet.get_submodule(name) for name in TRANSFORMERS]
    except AttributeError as error:
        raise ValueError(f"This UNet does not have SVD's layout ({error}), so no extension fits it.") from error


def base_weights(unet: UNetSpatioTemporalConditionModel) -> list[dict[str, torch.Tensor]]:
    """The 30 temporal weights of each of the 16 transformers, by their names under the SVD transformer.

    Raises:
        ValueError: the UNet does not have SVD's layout.
    """
    found = []
    for transformer in find_transformers(unet):
        state = transformer.state_dict()
        found.append({svd: state[ours] for svd, ours in SHARED.items()})
    return found


def sizes(unet: UNetSpatioTemporalConditionModel) -> tuple[list[int], int]:
    """Channels of the 16 transformers, and the width of the image embedding that they attend to.

    Raises:
        ValueError: the UNet does not have SVD's layout.
    """
    transformers = find_transformers(unet)
    context_dim = transformers[0].temporal_transformer_blocks[0].attn2.to_k.weight.shape[1]
    return [transformer.in_channels for transformer in transformers], context_dim


def is_extended(unet: UNetSpatioTemporalConditionModel) -> bool:
    """Whether an extension is applied to a UNet."""
    return isinstance(find_transformers(unet)[0], ExtendedTransformer)


def apply(
    unet: UNetSpatioTemporalConditionModel,
    extension: Extension,
    mode: PositionMode = "trained",
) -> None:
    """Apply an extension to a UNet, in place.

    Args:
        unet: an SVD UNet with the extension's widths.
        extension: the extension.
        mode: how trained positions are assigned to frames, see `positions.table_for`.

    Raises:
        ValueError: the extension does not fit, or the UNet already has one.
    """
    transformers = find_transformers(unet)
    if is_extended(unet):
        raise ValueError("This UNet already has an extension. Load the base model again.")
    extension.check_fits(*sizes(unet))
    for name, transformer, weights in zip(TRANSFORMERS, transformers, extension.blocks, strict=True):
        extended = ExtendedTransformer(transformer, weights, mode)
        state = {ours: weights.shared[svd] for svd, ours in SHARED.items()}
        with torch.no_grad():
            for parameter_name, value in state.items():
                extended.get_parameter(parameter_name).copy_(value)
        parent, _, index = name.rpartition(".")
        unet.get_submodule(parent)[int(index)] = extended


def collect(
    unet: UNetSpatioTemporalConditionModel,
    state: Mapping[str, torch.Tensor] | None = None,
    few_steps: FewSteps | None = None,
) -> Extension:
    """Collect the extension's weights from an extended UNet.

    Args:
        unet: a UNet with an extension.
        state: state dict to use instead of the UNet's own, such as a moving average or gathered shards.
        few_steps: how to sample the extension, if it was distilled for few steps.
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
    return Extension("trained", tuple(blocks), few_steps)
