"""Makes an untrained extension from a ComfyUI SVD model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ... import layouts
from ...extension import Extension
from .patch import applied_extension, find_transformers

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher


def untrained_extension(model: ModelPatcher, frames: int) -> Extension:
    """An extension of `frames` frames that holds the model's own temporal weights: see `Extension.untrained`.

    The base's weights as its checkpoint gave them are taken: LoRAs and other patches stay the model's, so that
    they are not counted twice once the extension is applied to it.

    Raises:
        ValueError: the model is no SVD, or carries an extension.
    """
    transformers = find_transformers(model)
    applied = applied_extension(model)
    if applied is not None:
        raise ValueError(
            f"This model has the extension '{applied.name}' applied. Connect the checkpoint's model directly."
        )
    # Behind patches that are loaded right now, this is the one place that knows the unpatched weights.
    originals = model.get_key_patches("diffusion_model.")
    shared = [
        {name: originals[f"{path}.{name}"][0][0].to("cpu", copy=True) for name in layouts.SHARED_TENSORS.values()}
        for path in transformers
    ]
    return Extension.untrained(shared, [transformer.in_channels for transformer in transformers.values()], frames)
