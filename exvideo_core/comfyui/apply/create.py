"""Creates an untrained extension from an SVD model, and reads the weights that it starts from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ...method.extension import Extension
from ...method.tensor_names import SHARED_TENSORS
from ..model import applied_extension, find_transformers, model_widths

if TYPE_CHECKING:
    import torch
    from comfy.model_patcher import ModelPatcher


def untrained_extension(model: ModelPatcher, frames: int) -> Extension:
    """Create an extension for `frames` frames from the model's own temporal weights, see `Extension.untrained`.

    Raises:
        ValueError: the model is not an SVD model, or has an extension applied.
    """
    shared = list(base_weights(model))
    return Extension.untrained(shared, model_widths(find_transformers(model)), frames)


def base_weights(model: ModelPatcher) -> Iterator[dict[str, torch.Tensor]]:
    """The model's 30 temporal weights for each of the 16 blocks, by their names under the SVD transformer.

    Weights are unpatched, as in the checkpoint: LoRAs would otherwise apply twice once the extension is applied to the
    model.

    Raises:
        ValueError: the model is not an SVD model, or has an extension applied.
    """
    transformers = find_transformers(model)
    applied = applied_extension(model)
    if applied is not None:
        raise ValueError(
            f"This model has the extension '{applied.name}' applied. Connect the checkpoint's model directly."
        )
    # While patches are loaded, only this method returns the unpatched weights.
    originals = model.get_key_patches("diffusion_model.")
    for path in transformers:
        yield {name: originals[f"{path}.{name}"][0][0].to("cpu", copy=True) for name in SHARED_TENSORS.values()}
