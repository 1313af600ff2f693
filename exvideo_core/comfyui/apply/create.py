"""Makes an untrained extension from a ComfyUI SVD model, and reads the weights it starts from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ...method import tensor_names
from ...method.extension import Extension
from .patch import applied_extension, find_transformers, model_widths

if TYPE_CHECKING:
    import torch
    from comfy.model_patcher import ModelPatcher


def untrained_extension(model: ModelPatcher, frames: int) -> Extension:
    """An extension of `frames` frames that holds the model's own temporal weights: see `Extension.untrained`.

    Raises:
        ValueError: the model is no SVD, or carries an extension.
    """
    shared = list(base_weights(model))
    return Extension.untrained(shared, model_widths(find_transformers(model)), frames)


def base_weights(model: ModelPatcher) -> Iterator[dict[str, torch.Tensor]]:
    """The model's 30 temporal weights of each of the 16 blocks, by their names under the SVD transformer.

    The base's weights as its checkpoint gave them are taken: LoRAs and other patches stay the model's, so that
    they are not counted twice once an extension is applied to it.

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
    for path in transformers:
        names = tensor_names.SHARED_TENSORS.values()
        yield {name: originals[f"{path}.{name}"][0][0].to("cpu", copy=True) for name in names}
