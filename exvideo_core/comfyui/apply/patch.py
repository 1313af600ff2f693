"""Applies an ExVideo extension to a ComfyUI SVD model, through its ModelPatcher.

How the weights get in, and why so:

* The 480 tensors that base and extension share go in as weight patches, `(1 - s) W + s E`: the entry that the
  host's own model merging makes. Hooks, partial loading and the memory accounting treat them like any LoRA. In each
  weight's list they stand behind merges, which make up the base, and in front of LoRAs, which add to the extension
  (`merges`). Replacing the modules instead would move one weight rather than two where a layer is streamed from RAM,
  but LoRAs and hooks would miss the new modules, and the dynamic patcher (0.33 on CUDA) restores
  small weights *by name*: with two modules of one name it would write one's weights into the other.
* The position table and the convolution are new. The 16 transformers are exchanged by object patches for
  `ExtendedVideoTransformer`s, which share every submodule of their base and add the convolution. Its module is made
  once for each model, as an identity, and the extension's weights are a patch on it like the others: the address
  space that the dynamic patcher reserves for a module is never given back. The module is always larger than the
  16 KB below which that patcher keeps a weight's backup by name, a backup that would be missing a home once an
  unpatched clone is loaded. The table can be smaller, so it is no parameter: a plain tensor that is cast to the
  device at use (at most 0.3 MB a block).
* Weight patches give the clone an identity of its own. Without them the host would take it for the same
  weights as its parent and leave the new convolutions on the offload device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import comfy.model_base
import comfy.model_management
import comfy.ops
import torch
from comfy.ldm.modules.attention import SpatialVideoTransformer
from comfy.patcher_extension import CallbacksMP

from ...choices import PositionMode
from ...method import tensor_names
from ...method.convolution import identity_convolution
from ...method.extension import Extension
from ..low_memory.estimate import MemorySettings, bounded_layers, configure, original
from ..sampling.preview import play_while_sampling
from ..wrappers import check_svd
from .merges import PatchOrder
from .transformer import ExtendedVideoTransformer

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

_ATTACHMENT = "exvideo"
_UNET = "diffusion_model."
#: The convolutions of each model, by the path of their transformer.
_convolutions: WeakKeyDictionary[comfy.model_base.BaseModel, dict[str, torch.nn.Conv3d]] = WeakKeyDictionary()


@dataclass(frozen=True)
class AppliedExtension:
    """What is applied to a model, kept as an attachment of its patcher."""

    name: str
    frames: int
    strength: float
    positions: PositionMode


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
    check_fits(extension, transformers)
    applied = applied_extension(model)
    if applied is not None:
        raise ValueError(
            f"This model has the extension '{applied.name}' already, and a model can have one. Connect the "
            "checkpoint's model to ExVideo Apply directly."
        )
    patched = model.clone()
    applied = AppliedExtension(extension.name, extension.frames, strength, positions)
    layers = _extended(patched, transformers, extension, applied)
    for path, layer in (layers | bounded_layers(patched)).items():
        patched.add_object_patch(path, layer)
    weight_patches = {
        f"{path}.{name}": (tensor,)
        for path, weights in zip(transformers, extension.blocks, strict=True)
        for name, tensor in weights.shared.items()
    }
    patched.add_patches(weight_patches, strength_patch=strength, strength_model=1.0 - strength)
    order = PatchOrder(extension.name, weight_patches)
    order.put_in_place(patched)
    for path, weights in zip(transformers, extension.blocks, strict=True):
        # Not by `add_patches`, which knows the weights of the unpatched model only.
        for name, tensor in (("weight", weights.conv_weight), ("bias", weights.conv_bias)):
            patched.patches[f"{path}.positional_conv.{name}"] = [(strength, (tensor,), 1.0 - strength, None, None)]
    # The host measures a model once, from its modules, and does not see those of object patches.
    added = sum(comfy.model_management.module_size(layer.positional_conv) for layer in layers.values())
    patched.size = model.model_size() + added
    configure(patched, MemorySettings())
    play_while_sampling(patched)
    patched.set_attachments(_ATTACHMENT, applied)
    patched.add_callback_with_key(CallbacksMP.ON_CLONE, _ATTACHMENT, _OwnLayers(extension, applied))
    patched.add_callback_with_key(CallbacksMP.ON_CLONE, _ATTACHMENT, order)
    order(model, patched)
    return patched


def with_memory(model: ModelPatcher, settings: MemorySettings) -> ModelPatcher:
    """A clone of a model with an extension, computed in chunks of other sizes.

    Raises:
        ValueError: the model has no extension, whose layers do so.
    """
    if applied_extension(model) is None:
        raise ValueError("This model has no ExVideo extension. Connect the model from ExVideo Apply.")
    patched = model.clone()
    configure(patched, settings)
    return patched


def _extended(
    patcher: ModelPatcher,
    transformers: Mapping[str, SpatialVideoTransformer],
    extension: Extension,
    applied: AppliedExtension,
) -> dict[str, ExtendedVideoTransformer]:
    convolutions = _convolutions.get(patcher.model)
    if convolutions is None:
        convolutions = {path: _identity(patcher.model, base.in_channels) for path, base in transformers.items()}
        _convolutions[patcher.model] = convolutions
    return {
        path: ExtendedVideoTransformer(
            base, convolutions[path], weights.positions, applied.positions, applied.strength, applied.name
        )
        for (path, base), weights in zip(transformers.items(), extension.blocks, strict=True)
    }


class _OwnLayers:
    """Gives a clone with a model of its own, as the host makes them for further GPUs, layers of its own.

    Its parent's layers hold the parent's weights. The host makes such a clone anew for every run, so its layers are
    kept with its model.
    """

    def __init__(self, extension: Extension, applied: AppliedExtension) -> None:
        self._extension, self._applied = extension, applied
        self._made: WeakKeyDictionary[torch.nn.Module, dict[str, torch.nn.Module]] = WeakKeyDictionary()

    def __call__(self, parent: ModelPatcher, clone: ModelPatcher) -> None:
        if clone.model is parent.model:
            return
        if clone.model not in self._made:
            paths = [_UNET + name for name in tensor_names.SVD_TRANSFORMERS]
            bases = {path: original(clone, path) for path in paths}
            self._made[clone.model] = {
                **_extended(clone, bases, self._extension, self._applied),
                **bounded_layers(clone, unpatched=True),
            }
        for path, layer in self._made[clone.model].items():
            clone.add_object_patch(path, layer)


def applied_extension(model: ModelPatcher) -> AppliedExtension | None:
    """What is applied to a model, if anything is."""
    return model.get_attachment(_ATTACHMENT)


def check_fits(extension: Extension, transformers: Mapping[str, SpatialVideoTransformer]) -> None:
    """Check that an extension is of a model's widths.

    Raises:
        ValueError: it is not.
    """
    context_dim = next(iter(transformers.values())).time_stack[0].attn2.to_k.weight.shape[1]
    extension.check_fits(model_widths(transformers), context_dim)


def model_widths(transformers: Mapping[str, SpatialVideoTransformer]) -> list[int]:
    """Channels of each of the 16 transformers."""
    return [transformer.in_channels for transformer in transformers.values()]


def find_transformers(model: ModelPatcher) -> dict[str, SpatialVideoTransformer]:
    """The 16 transformers that extensions extend, by their path in the patcher's model."""
    check_svd(model)
    other = "It is an SVD of another layout. Load an SVD checkpoint, such as svd_xt."
    transformers: dict[str, SpatialVideoTransformer] = {}
    for name in tensor_names.SVD_TRANSFORMERS:
        path = _UNET + name
        try:
            # The unpatched original: the same model may be patched with another clone's transformers right now.
            transformer = model.get_model_object(path)
        except AttributeError as error:
            raise ValueError(f"The model has no transformer {name}. {other}") from error
        if not isinstance(transformer, SpatialVideoTransformer) or len(transformer.time_stack) != 1:
            raise ValueError(f"The model's {name} is another {type(transformer).__name__}. {other}")
        transformers[path] = transformer
    return transformers


def _identity(model: comfy.model_base.BaseModel, channels: int) -> torch.nn.Conv3d:
    """A 3-D convolution that changes nothing, as a layer of the host: casting and offload come with it."""
    dtype = model.get_dtype()
    if dtype.itemsize < 2:  # fp8 has no convolution: keep the type it computes in
        dtype = model.manual_cast_dtype or torch.float16
    operations = comfy.ops.pick_operations(dtype, model.manual_cast_dtype)
    # Padding is done by the caller: one of the host's convolution paths ignores the padding mode.
    conv = operations.Conv3d(channels, channels, 3, dtype=dtype, device="meta")
    # Of zeros that are never written the system keeps no copy in memory.
    conv.weight = torch.nn.Parameter(identity_convolution(channels, dtype), requires_grad=False)
    conv.bias = torch.nn.Parameter(torch.zeros(channels, dtype=dtype), requires_grad=False)
    return conv
