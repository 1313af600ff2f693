"""CogVideoX 1.0 in ComfyUI: the reference's rotary positions, and transformers in diffusers' layout.

ComfyUI multiplies the positions of rows and columns by 1.875, which is the scale of CogVideoX-2B's sinusoidal
positions; the rotary positions of CogVideoX-5B have none, and are rescaled to a crop of the trained size.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import comfy.model_base
import comfy.sd
import comfy.utils
import torch

from ..files.safetensors_header import ModelFileError
from ..method.cogvideox import check_diffusers_transformer, host_name, reference_rotary, shards

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

    from ..method.cogvideox import Rotary

_ROTARY = "diffusion_model._get_rotary_emb"
_TOLERANCE = 1e-4


def is_first_version(model: ModelPatcher) -> bool:
    """Whether a CogVideoX model is a CogVideoX 1.0 with rotary positions, such as CogVideoX-5B."""
    transformer = model.get_model_object("diffusion_model")
    return transformer.patch_size_t is None and transformer.use_rotary_positional_embeddings


def with_reference_positions(model: ModelPatcher) -> ModelPatcher:
    """A clone of a CogVideoX 1.0 model with the reference's rotary positions.

    The model is only patched while ComfyUI's own positions differ, and never if another node has patched them.
    """
    patched = model.clone()
    transformer = model.get_model_object("diffusion_model")
    base = (
        transformer.patch_embed.sample_height // transformer.patch_size,
        transformer.patch_embed.sample_width // transformer.patch_size,
    )
    rotary = reference_rotary(base, transformer.attention_head_dim)
    # The class's own: the module may have another clone's patch at the moment.
    own = type(transformer)._get_rotary_emb.__get__(transformer)
    if _ROTARY not in model.object_patches and _differ(own, rotary, base):
        patched.add_object_patch(_ROTARY, rotary)
    return patched


def _differ(one: Rotary, other: Rotary, base: tuple[int, int]) -> bool:
    """Whether two rotary embeddings differ at the trained size or at half of its height."""
    device = torch.device("cpu")
    for height in (base[0], base[0] // 2):
        pairs = zip(one(height, base[1], 2, device), other(height, base[1], 2, device), strict=True)
        if any((mine - theirs).abs().max() > _TOLERANCE for mine, theirs in pairs):
            return True
    return False


def load_diffusers_transformer(path: str | os.PathLike[str], disable_dynamic: bool = False) -> ModelPatcher:
    """Load a CogVideoX transformer in diffusers' layout.

    Args:
        path: a file, or any shard of several, which have to be in one folder.
        disable_dynamic: load without ComfyUI's dynamic VRAM.

    Raises:
        ModelFileError: the file is something else, or a shard is missing.
        ValueError: this version of ComfyUI has no CogVideoX.
    """
    if not hasattr(comfy.model_base, "CogVideoX"):
        raise ValueError("This version of ComfyUI does not have CogVideoX. Update ComfyUI to 0.33 or newer.")
    tensors: dict[str, torch.Tensor] = {}
    for shard in shards(path):
        check_diffusers_transformer(shard)
        for name, tensor in comfy.utils.load_torch_file(os.fspath(shard), safe_load=True).items():
            tensors[str(host_name(name))] = tensor
    names = set(tensors)
    model = comfy.sd.load_diffusion_model_state_dict(tensors, disable_dynamic=disable_dynamic)
    missing = ["blocks"] if model is None else sorted(model.model.diffusion_model.state_dict().keys() - names)
    if missing:
        raise ModelFileError(
            path, f"is an incomplete CogVideoX transformer, without {missing[0]}.", "Download all of its files again."
        )
    model.cached_patcher_init = (load_diffusers_transformer, (os.fspath(path),))
    return model
