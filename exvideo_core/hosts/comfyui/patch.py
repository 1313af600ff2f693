"""Applies an ExVideo extension to a ComfyUI SVD model, through its ModelPatcher.

How the weights get in, and why so:

* The 480 tensors that base and extension share go in as weight patches, `(1 - s) W + s E`: the entry that the
  host's own model merging makes. They stand first in each weight's list, so LoRAs add to the extension
  whether they were applied before or after it, and hooks, partial loading and the memory accounting treat them
  like any LoRA. Replacing the modules instead would move one weight rather than two where a layer is streamed
  from RAM, but LoRAs and hooks would miss the new modules, and the dynamic patcher (0.33 on CUDA) restores
  small weights *by name*: with two modules of one name it would write one's weights into the other.
* The position table and the convolution are new. The 16 transformers are exchanged by object patches for
  `ExtendedVideoTransformer`s, which share every submodule of their base and add the convolution. It is always
  larger than the 16 KB below which the dynamic patcher keeps a weight's backup by name, and that backup would be
  missing a home once an unpatched clone is loaded. The table can be smaller, so it is no parameter: a
  plain tensor that is cast to the device at use (at most 0.3 MB a block).
* Weight patches give the clone an identity of its own. Without them the host would take it for the same
  weights as its parent and leave the new convolutions on the offload device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import comfy.model_base
import comfy.model_management
import comfy.ops
import torch
from comfy.ldm.modules.attention import SpatialVideoTransformer

from ... import layouts
from ...extension import BlockWeights, Extension
from ...position_modes import PositionMode
from ...positions import blended_table
from ...temporal import blended_convolution, positional_convolution

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

_ATTACHMENT = "exvideo"
_UNET = "diffusion_model."


@dataclass(frozen=True)
class AppliedExtension:
    """What is applied to a model, kept as an attachment of its patcher."""

    name: str
    frames: int
    strength: float
    positions: PositionMode


class ExtendedVideoTransformer(SpatialVideoTransformer):
    """An SVD transformer whose temporal block reads trained positions through a 3-D convolution.

    It is a subclass because the host dispatches on the class. All submodules are the base's own, under the
    same names; only `positional_conv` is new.

    Args:
        base: the model's transformer.
        weights: the extension's block for it.
        conv: 3x3x3 convolution without padding.
        positions, strength: as in `apply_extension`.
    """

    def __init__(
        self,
        base: SpatialVideoTransformer,
        weights: BlockWeights,
        conv: torch.nn.Module,
        positions: PositionMode,
        strength: float,
    ) -> None:
        torch.nn.Module.__init__(self)  # the host's own __init__ would allocate a second set of weights
        registries = {"_parameters", "_buffers", "_modules"}
        self.__dict__.update({key: value for key, value in vars(base).items() if key not in registries})
        for name, module in base.named_children():
            self.add_module(name, module)
        self.positional_conv = conv
        self.position_table = weights.positions
        self.position_mode: PositionMode = positions
        self.position_strength = strength

    def forward(
        self,
        x: torch.Tensor,
        context: torch.Tensor | None = None,
        time_context: torch.Tensor | None = None,
        timesteps: int | None = None,
        image_only_indicator: torch.Tensor | None = None,
        transformer_options: dict[str, Any] | None = None,
    ) -> torch.Tensor:
        """The host transformer's contract: x [B*T, C, H, W] and context [B*T, N, D] with T = `timesteps` frames."""
        options: dict[str, Any] = {} if transformer_options is None else transformer_options
        height, width = x.shape[-2:]
        frames = x.shape[0] if timesteps is None else timesteps
        options["activations_shape"] = list(x.shape)
        options["block_index"] = 0

        tokens = self._project(self.norm(x), self.proj_in, to_tokens=True)
        spatial = self.transformer_blocks[0](tokens, context=context, transformer_options=options)

        # One key per clip, the first frame's image embedding, for every pixel's sequence of frames.
        clip_context = (context if time_context is None else time_context)[::frames]
        pixel_context = clip_context.repeat_interleave(height * width, dim=0)
        table = blended_table(self.position_table, frames, self.position_mode, self.position_strength)
        positions = self.time_pos_embed(comfy.model_management.cast_to_device(table, x.device, x.dtype))
        sequences = positional_convolution(spatial, positions, self.positional_conv, height, width)
        sequences = self.time_stack[0](sequences, context=pixel_context, transformer_options=options)
        temporal = sequences.unflatten(0, (-1, height * width)).transpose(1, 2).flatten(0, 1)

        mixed = self.time_mixer(x_spatial=spatial, x_temporal=temporal, image_only_indicator=image_only_indicator)
        return x + self._project(mixed, self.proj_out, to_tokens=False, size=(height, width))

    def _project(
        self, x: torch.Tensor, layer: torch.nn.Module, to_tokens: bool, size: tuple[int, int] | None = None
    ) -> torch.Tensor:
        """The projections stand on the token side when they are linear, on the picture side when convolutions."""
        if to_tokens:
            x = x if self.use_linear else layer(x)
            x = x.flatten(2).transpose(1, 2).contiguous()
            return layer(x) if self.use_linear else x
        x = layer(x) if self.use_linear else x
        x = x.transpose(1, 2).unflatten(2, size)
        return x if self.use_linear else layer(x)


def apply_extension(
    model: ModelPatcher, extension: Extension, strength: float = 1.0, positions: PositionMode = "trained"
) -> ModelPatcher:
    """A clone of an SVD model with the extension applied.

    Args:
        model: a ComfyUI SVD model of the extension's widths, of any checkpoint, with or without LoRAs.
        extension: the extension.
        strength: 0 is the model as it was, 1 the extension; weights, positions and convolution move together.
        positions: how the trained position table serves the clip's frames, see `positions.table_for`.

    Raises:
        ValueError: the model is no SVD, has an extension already, or the extension does not fit it.
    """
    transformers = find_transformers(model)
    extension.check_fits(
        [transformer.in_channels for transformer in transformers.values()],
        next(iter(transformers.values())).time_stack[0].attn2.to_k.weight.shape[1],
    )
    applied = applied_extension(model)
    if applied is not None:
        raise ValueError(
            f"This model has the extension '{applied.name}' already, and a model can have one. Connect the "
            "checkpoint's model to ExVideo Apply directly."
        )
    patched = model.clone()
    if strength == 0.0:
        return patched

    weight_patches: dict[str, tuple[torch.Tensor]] = {}
    added_bytes = 0
    for (path, base), weights in zip(transformers.items(), extension.blocks, strict=True):
        conv = _convolution(model.model, weights, strength)
        added_bytes += comfy.model_management.module_size(conv)
        patched.add_object_patch(path, ExtendedVideoTransformer(base, weights, conv, positions, strength))
        weight_patches |= {f"{path}.{name}": (tensor,) for name, tensor in weights.shared.items()}
    patched.add_patches(weight_patches, strength_patch=strength, strength_model=1.0 - strength)
    for key in weight_patches:
        patched.patches[key].insert(0, patched.patches[key].pop())
    # The host measures a model once, from its modules, and does not see those of object patches.
    patched.size = model.model_size() + added_bytes
    patched.set_attachments(_ATTACHMENT, AppliedExtension(extension.name, extension.frames, strength, positions))
    return patched


def applied_extension(model: ModelPatcher) -> AppliedExtension | None:
    """What is applied to a model, if anything is."""
    return model.get_attachment(_ATTACHMENT)


def find_transformers(model: ModelPatcher) -> dict[str, SpatialVideoTransformer]:
    """The 16 transformers that extensions extend, by their path in the patcher's model."""
    not_svd = "ExVideo extends Stable Video Diffusion (SVD) only. Load an SVD checkpoint, such as svd_xt."
    if not isinstance(model.model, comfy.model_base.SVD_img2vid):
        raise ValueError(f"The model is a {type(model.model).__name__}. {not_svd}")
    transformers: dict[str, SpatialVideoTransformer] = {}
    for name in layouts.SVD_TRANSFORMERS:
        path = _UNET + name
        try:
            # The unpatched original: the same model may be patched with another clone's transformers right now.
            transformer = model.get_model_object(path)
        except AttributeError as error:
            raise ValueError(f"The model has no transformer {name}. {not_svd}") from error
        if not isinstance(transformer, SpatialVideoTransformer) or len(transformer.time_stack) != 1:
            raise ValueError(f"The model's {name} is a {type(transformer).__name__} of another layout. {not_svd}")
        transformers[path] = transformer
    return transformers


def _convolution(model: comfy.model_base.BaseModel, weights: BlockWeights, strength: float) -> torch.nn.Module:
    """The block's convolution as a layer of the host, so that casting, offload and cancellation come with it."""
    dtype = model.get_dtype()
    if dtype.itemsize < 2:  # fp8 has no convolution: keep the type it computes in
        dtype = model.manual_cast_dtype or weights.conv_weight.dtype
    channels = weights.conv_bias.shape[0]
    operations = comfy.ops.pick_operations(dtype, model.manual_cast_dtype)
    # Padding is done by the caller: one of the host's convolution paths ignores the padding mode.
    conv = operations.Conv3d(channels, channels, 3, dtype=dtype, device="meta")
    weight, bias = blended_convolution(weights.conv_weight, weights.conv_bias, strength)
    conv.weight = torch.nn.Parameter(weight.to(dtype), requires_grad=False)
    conv.bias = torch.nn.Parameter(bias.to(dtype), requires_grad=False)
    return conv
