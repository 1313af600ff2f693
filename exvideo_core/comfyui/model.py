"""SVD models of ComfyUI: their transformers, their original modules, and the extension that is applied to them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import comfy.model_base
import comfy.utils
import torch
from comfy.ldm.modules.attention import SpatialVideoTransformer

from ..choices import PositionMode
from ..method.extension import Extension
from ..method.tensor_names import SVD_TRANSFORMERS

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

ATTACHMENT = "exvideo"
UNET = "diffusion_model."


@dataclass(frozen=True)
class AppliedExtension:
    """The extension of a model, kept as an attachment of its patcher."""

    name: str
    frames: int
    strength: float
    positions: PositionMode


def applied_extension(model: ModelPatcher) -> AppliedExtension | None:
    """The extension that is applied to a model, if any."""
    return model.get_attachment(ATTACHMENT)


def check_svd(model: ModelPatcher) -> None:
    """Check that a model is an SVD model.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(model.model, comfy.model_base.SVD_img2vid):
        raise ValueError(
            f"The model is a {type(model.model).__name__}, but this node is for Stable Video Diffusion (SVD). "
            "Load an SVD checkpoint, such as svd_xt."
        )


def find_transformers(model: ModelPatcher) -> dict[str, SpatialVideoTransformer]:
    """The 16 transformers that an extension changes, by their path in the patcher's model.

    Raises:
        ValueError: the model is not an SVD model, or has another layout.
    """
    check_svd(model)
    other = "It has a different layout from SVD. Load an SVD checkpoint, such as svd_xt."
    transformers: dict[str, SpatialVideoTransformer] = {}
    for name in SVD_TRANSFORMERS:
        path = UNET + name
        try:
            # The unpatched original: the same model may be patched with another clone's transformers right now.
            transformer = model.get_model_object(path)
        except AttributeError as error:
            raise ValueError(f"The model has no transformer {name}. {other}") from error
        if not isinstance(transformer, SpatialVideoTransformer) or len(transformer.time_stack) != 1:
            raise ValueError(f"The model's {name} is a different {type(transformer).__name__}. {other}")
        transformers[path] = transformer
    return transformers


def model_widths(transformers: Mapping[str, SpatialVideoTransformer]) -> list[int]:
    """Channels of each of the 16 transformers."""
    return [transformer.in_channels for transformer in transformers.values()]


def check_fits(extension: Extension, transformers: Mapping[str, SpatialVideoTransformer]) -> None:
    """Check that an extension has a model's widths.

    Raises:
        ValueError: it does not.
    """
    context_dim = next(iter(transformers.values())).time_stack[0].attn2.to_k.weight.shape[1]
    extension.check_fits(model_widths(transformers), context_dim)


def original_module(patcher: ModelPatcher, path: str) -> torch.nn.Module:
    """The model's own module at `path`, whatever object patches replace it, now or once loaded."""
    backup = patcher.object_patches_backup.get(path)
    return comfy.utils.get_attr(patcher.model, path) if backup is None else backup


def share_submodules(module: torch.nn.Module, base: torch.nn.Module) -> None:
    """Give `module` the submodules and settings of `base`: the same weights, under the same names.

    Its class's own `__init__` would allocate a second set of weights.
    """
    torch.nn.Module.__init__(module)
    registries = {"_parameters", "_buffers", "_modules"}
    module.__dict__.update({key: value for key, value in vars(base).items() if key not in registries})
    for name, child in base.named_children():
        module.add_module(name, child)
