"""Applies an ExVideo extension to an SVD model, through ComfyUI's ModelPatcher.

How the weights are applied, and why:

* The 480 tensors that base and extension share are weight patches, `(1 - s) W + s E`, as ComfyUI's own model merging
  makes them. Hooks, partial loading and the memory accounting treat them like any LoRA. In each weight's list of
  patches they come after merges, which change the base, and before LoRAs, which add to the extension (`merges.py`).
  Replacing the modules instead would transfer one weight rather than two where a layer is streamed from RAM, but LoRAs
  and hooks would miss the new modules, and the dynamic patcher (0.33 on CUDA) restores small weights *by name*: with
  two modules of one name it would write one's weights into the other.
* The position table and the convolution are new. Object patches replace the 16 transformers by
  `ExtendedVideoTransformer`s, which share every submodule of their base and add the convolution. Its module is created
  once per model, as an identity, and the extension's weights are a patch on it like the others: the dynamic patcher
  never frees the address space that it reserves for a module. The module is always larger than 16 KB: below that, the
  patcher would keep a backup of its weight by name, and fail to restore it once an unpatched clone is loaded. The table
  can be smaller, so it is not a parameter but a plain tensor that is cast to the device when used (at most 0.3 MB per
  block).
* Weight patches make the clone differ from its parent. Without them ComfyUI would assume that both have the same
  weights, and leave the new convolutions on the offload device.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import comfy.model_base
import comfy.model_management
import comfy.ops
import torch
from comfy.ldm.modules.attention import SpatialVideoTransformer
from comfy.patcher_extension import CallbacksMP

from ...choices import PositionMode
from ...method.convolution import identity_convolution
from ...method.extension import Extension
from ...method.tensor_names import SVD_TRANSFORMERS
from ..low_memory.chunked_unet import chunked_layers, set_memory_settings
from ..low_memory.estimate import MemorySettings
from ..model import (
    ATTACHMENT,
    UNET,
    AppliedExtension,
    applied_extension,
    check_fits,
    find_transformers,
    original_module,
)
from ..sampling.few_steps import add_settings_check, set_sigma_range
from ..sampling.preview import add_preview
from .merges import PatchOrder
from .transformer import ExtendedVideoTransformer

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

#: The convolutions of each model, by their transformer's path.
_convolutions: WeakKeyDictionary[comfy.model_base.BaseModel, dict[str, torch.nn.Conv3d]] = WeakKeyDictionary()


def apply_extension(
    model: ModelPatcher, extension: Extension, strength: float = 1.0, positions: PositionMode = "trained"
) -> ModelPatcher:
    """Apply an extension to a clone of an SVD model.

    Args:
        model: an SVD model with the extension's widths, from any checkpoint, with or without LoRAs.
        extension: the extension.
        strength: 0 is the unpatched model, 1 the extension; weights, positions and convolution are interpolated.
        positions: how trained positions are assigned to the video's frames, see `positions.table_for`.

    Returns:
        The patched clone.

    Raises:
        ValueError: the model is not an SVD model, already has an extension, or the extension does not fit it.
    """
    transformers = find_transformers(model)
    check_fits(extension, transformers)
    applied = applied_extension(model)
    if applied is not None:
        raise ValueError(
            f"This model already has the extension '{applied.name}', and a model can have only one. Connect the "
            "checkpoint's model to ExVideo Apply directly."
        )
    patched = model.clone()
    applied = AppliedExtension(extension.name, extension.frames, strength, positions)
    layers = _extended_transformers(patched, transformers, extension, applied)
    for path, layer in (layers | chunked_layers(patched)).items():
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
        # Not with `add_patches`, which accepts only weights of the unpatched model.
        for name, tensor in (("weight", weights.conv_weight), ("bias", weights.conv_bias)):
            patched.patches[f"{path}.positional_conv.{name}"] = [(strength, (tensor,), 1.0 - strength, None, None)]
    # ComfyUI measures a model once, without the modules of object patches.
    added = sum(comfy.model_management.module_size(layer.positional_conv) for layer in layers.values())
    patched.size = model.model_size() + added
    set_memory_settings(patched, MemorySettings())
    if extension.few_steps is not None and strength > 0:
        set_sigma_range(patched, extension.few_steps.sigma_max, extension.few_steps.sigma_min)
        add_settings_check(patched, extension.name, extension.few_steps)
    add_preview(patched)
    patched.set_attachments(ATTACHMENT, applied)
    patched.add_callback_with_key(CallbacksMP.ON_CLONE, ATTACHMENT, _LayersOfClones(extension, applied))
    patched.add_callback_with_key(CallbacksMP.ON_CLONE, ATTACHMENT, order)
    order(model, patched)
    return patched


def _extended_transformers(
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


class _LayersOfClones:
    """ON_CLONE callback: builds new layers for clones that have their own model, as ComfyUI creates for more GPUs.

    The parent's layers refer to the parent's weights. ComfyUI creates these clones again for every run, so their layers
    are cached by model.
    """

    def __init__(self, extension: Extension, applied: AppliedExtension) -> None:
        self._extension, self._applied = extension, applied
        self._layers: WeakKeyDictionary[torch.nn.Module, dict[str, torch.nn.Module]] = WeakKeyDictionary()

    def __call__(self, parent: ModelPatcher, clone: ModelPatcher) -> None:
        if clone.model is parent.model:
            return
        if clone.model not in self._layers:
            paths = [UNET + name for name in SVD_TRANSFORMERS]
            bases = {path: original_module(clone, path) for path in paths}
            self._layers[clone.model] = {
                **_extended_transformers(clone, bases, self._extension, self._applied),
                **chunked_layers(clone, unpatched=True),
            }
        for path, layer in self._layers[clone.model].items():
            clone.add_object_patch(path, layer)


def _identity(model: comfy.model_base.BaseModel, channels: int) -> torch.nn.Conv3d:
    """An identity 3-D convolution as a ComfyUI layer, which handles casting and offloading."""
    dtype = model.get_dtype()
    if dtype.itemsize < 2:  # fp8 has no convolution: use the dtype that the model computes in
        dtype = model.manual_cast_dtype or torch.float16
    operations = comfy.ops.pick_operations(dtype, model.manual_cast_dtype)
    # The caller pads: one of ComfyUI's convolution paths ignores the padding mode.
    conv = operations.Conv3d(channels, channels, 3, dtype=dtype, device="meta")
    # Zeros that are never written take up no physical memory.
    conv.weight = torch.nn.Parameter(identity_convolution(channels, dtype), requires_grad=False)
    conv.bias = torch.nn.Parameter(torch.zeros(channels, dtype=dtype), requires_grad=False)
    return conv
