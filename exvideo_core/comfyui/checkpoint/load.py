"""Loads an SVD checkpoint of any width.

ComfyUI recognizes SVD only by its published widths (320 channels, a 1024-wide image embedding, CLIP ViT-H). Files with
these widths go to ComfyUI's own loader. For all others, the same ComfyUI classes are built with the sizes read from the
file's shapes and metadata.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile

import comfy.clip_vision
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.utils
import torch

from ...files.safetensors_header import ModelFileError, read_header
from .validate import CLIP_HEADS, UNET, VAE, Sizes, build_vae, clip_vision_weights, read_sizes, unet_config

LoadedCheckpoint = tuple[comfy.model_patcher.ModelPatcher, comfy.clip_vision.ClipVisionModel, comfy.sd.VAE]


def load_checkpoint(path: str) -> LoadedCheckpoint:
    """Load an SVD checkpoint: diffusion model, CLIP vision model and VAE.

    Raises:
        ModelFileError: the file is not a complete SVD checkpoint.
    """
    if os.path.splitext(path)[1] != ".safetensors":
        raise ModelFileError(path, "is not a .safetensors file.", "Use an SVD checkpoint, such as svd_xt.safetensors.")
    sizes = read_sizes(path, read_header(path))
    if sizes.is_published:
        model, _, vae, clip_vision = comfy.sd.load_checkpoint_guess_config(
            path, output_clip=False, output_clipvision=True
        )
        return model, clip_vision, vae
    sd = comfy.utils.load_torch_file(path)
    clip_vision = _load_clip_vision(sd, sizes)
    vae = _load_vae(sd, sizes)
    vae.patcher.cached_patcher_init = (_reload_vae, (path,))
    model = _load_unet(sd, sizes)
    model.cached_patcher_init = (_reload_unet, (path,))
    return model, clip_vision, vae


def _reload_unet(path: str, disable_dynamic: bool = False) -> comfy.model_patcher.ModelPatcher:
    """Load the diffusion model again, for ComfyUI's multi-GPU clones."""
    return _load_unet(comfy.utils.load_torch_file(path), read_sizes(path, read_header(path)), disable_dynamic)


def _load_vae(sd: dict[str, torch.Tensor], sizes: Sizes) -> comfy.sd.VAE:
    return _VideoVAE(comfy.utils.state_dict_prefix_replace(sd, {VAE: ""}, filter_keys=True), sizes)


def _reload_vae(path: str, disable_dynamic: bool = False) -> comfy.model_patcher.ModelPatcher:  # noqa: ARG001
    """Load the VAE's model again, for ComfyUI's Select VAE Device node."""
    return _load_vae(comfy.utils.load_torch_file(path), read_sizes(path, read_header(path))).patcher


def _load_unet(
    sd: dict[str, torch.Tensor], sizes: Sizes, disable_dynamic: bool = False
) -> comfy.model_patcher.ModelPatcher:
    management = comfy.model_management
    config = unet_config(sizes.unet)
    parameters = comfy.utils.calculate_parameters(sd, UNET)
    load_device = management.get_torch_device()
    supported = list(config.supported_inference_dtypes)
    dtype = management.unet_dtype(
        model_params=parameters, supported_dtypes=supported, weight_dtype=comfy.utils.weight_dtype(sd, UNET)
    )
    config.set_inference_dtype(dtype, management.unet_manual_cast(dtype, load_device, supported))
    model = config.get_model(sd, UNET, device=management.unet_inital_load_device(parameters, dtype))
    patcher_class = comfy.model_patcher.ModelPatcher
    if not disable_dynamic:  # ComfyUI 0.3.64 has only one class
        patcher_class = getattr(comfy.model_patcher, "CoreModelPatcher", patcher_class)
    patcher = patcher_class(model, load_device=load_device, offload_device=management.unet_offload_device())
    model.load_model_weights(sd, UNET)
    return patcher


def _load_clip_vision(sd: dict[str, torch.Tensor], sizes: Sizes) -> comfy.clip_vision.ClipVisionModel:
    with tempfile.TemporaryDirectory() as folder:  # ComfyUI 0.3.64 reads the configuration only from a file
        path = os.path.join(folder, "clip_vision_config.json")
        with open(path, "w", encoding="utf-8") as file:
            json.dump(sizes.clip_vision, file)
        clip_vision = _ClipVision(path)
    clip_vision.load_sd(clip_vision_weights(sd))
    return clip_vision


class _ClipVision(comfy.clip_vision.ClipVisionModel):
    """ComfyUI's image encoder, which saves its number of attention heads along with the weights."""

    def __init__(self, json_config: str) -> None:
        super().__init__(json_config)
        with open(json_config, encoding="utf-8") as file:
            self._heads = float(json.load(file)["num_attention_heads"])

    def get_sd(self) -> dict[str, torch.Tensor]:
        return {**super().get_sd(), CLIP_HEADS: torch.tensor(self._heads)}


class _VideoVAE(comfy.sd.VAE):
    """ComfyUI's VAE with a temporal decoder of any width.

    Args:
        sd: weights of SVD's `AutoencodingEngine` (encoder and temporal decoder).
        sizes: sizes of the checkpoint.
    """

    def __init__(self, sd: dict[str, torch.Tensor], sizes: Sizes) -> None:
        super().__init__(sd={})  # sets the defaults of this ComfyUI version, and warns that there are no weights
        logging.info("The ExVideo loader has initialized the VAE: ignore the warning above.")
        management = comfy.model_management
        self.first_stage_model = build_vae(sizes.vae).eval()
        self.first_stage_model.load_state_dict(sd, strict=False)  # files may have additional tensors
        self.device = management.vae_device()
        self.vae_dtype = management.vae_dtype(self.device, self.working_dtypes)
        self.first_stage_model.to(self.vae_dtype)
        self.output_device = management.intermediate_device()
        patcher_class = getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)
        self.patcher = patcher_class(
            self.first_stage_model, load_device=self.device, offload_device=management.vae_offload_device()
        )
        self.size = management.module_size(self.first_stage_model)
