"""Applies ExVideo's LoRAs for CogVideoX and Wan, with ComfyUI's own LoRA code."""

from __future__ import annotations

from typing import TYPE_CHECKING

import comfy.lora
import comfy.model_base

from ..method.lora import COGVIDEOX, LoraFile, listed
from . import cogvideox

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher


def apply_lora(model: ModelPatcher, lora: LoraFile, strength: float) -> ModelPatcher:
    """A clone of a model with a LoRA. For CogVideoX, it also has the reference's positions (`cogvideox`).

    Args:
        model: a CogVideoX-5B or Wan 2.1 model, as the LoRA requires.
        lora: the LoRA.
        strength: factor on its weights. At 0, the weights are not patched.

    Raises:
        ValueError: the LoRA is for another model.
    """
    _check_family(model, lora)
    _check_shapes(model, lora)
    patched = cogvideox.with_reference_positions(model) if lora.family is COGVIDEOX else model.clone()
    if strength:
        tensors = lora.tensors()
        loaded = comfy.lora.load_lora(tensors, comfy.lora.model_lora_keys_unet(model.model, {}), log_missing=False)
        applied = set(patched.add_patches(loaded, strength))
        lost = [module for module in lora.pairs if f"diffusion_model.{module}.weight" not in applied]
        if lost:
            raise ValueError(
                f"ComfyUI did not apply the LoRA '{lora.name}' to {listed(lost)}. Please report this with the versions "
                "of ComfyUI and of this pack."
            )
    return patched


def _check_family(model: ModelPatcher, lora: LoraFile) -> None:
    kind = getattr(comfy.model_base, "CogVideoX", None) if lora.family is COGVIDEOX else comfy.model_base.WAN21
    if kind is None:
        raise ValueError(
            f"The LoRA '{lora.name}' is for CogVideoX, which this version of ComfyUI does not have. Update ComfyUI to "
            "0.33 or newer."
        )
    if not isinstance(model.model, kind):
        raise ValueError(
            f"The LoRA '{lora.name}' is for {lora.family.name}, but the model is a {type(model.model).__name__}. "
            f"Load {lora.family.published}."
        )
    if lora.family is COGVIDEOX and not cogvideox.is_first_version(model):
        raise ValueError(
            f"The LoRA '{lora.name}' is for {lora.family.name}, but the model is a CogVideoX 1.5, a CogVideoX-2B or "
            f"one of their variants. Load {lora.family.published}."
        )


def _check_shapes(model: ModelPatcher, lora: LoraFile) -> None:
    shapes = {name: tuple(weight.shape) for name, weight in model.model.state_dict().items()}
    names = {module: f"diffusion_model.{module}.weight" for module in lora.pairs}
    missing = [module for module, name in names.items() if name not in shapes]
    if missing:
        raise ValueError(
            f"The LoRA '{lora.name}' does not fit this model, which has no {listed(missing)}. Load "
            f"{lora.family.published}."
        )
    for module, pair in lora.pairs.items():
        if shapes[names[module]] != pair.shape:
            raise ValueError(
                f"The LoRA '{lora.name}' does not fit this model: for {module}, it changes a weight of "
                f"{pair.shape}, the model has {shapes[names[module]]}. Load {lora.family.published}."
            )
