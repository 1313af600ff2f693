"""Loads an SVD checkpoint of any width.

The host knows SVD by its exact widths (320 channels, a 1024-wide image embedding, CLIP ViT-H). Such files go
to the host's own loader. For the others the same host classes are built with the sizes that the file's shapes
and metadata tell.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from typing import Any

import comfy.clip_vision
import comfy.model_detection
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.supported_models
import comfy.utils
import torch
from comfy.ldm.models.autoencoder import AutoencodingEngine

from ...safetensors_header import ModelFileError, read_header

_UNET = "model.diffusion_model."
_VAE = "first_stage_model."
_CLIP = comfy.supported_models.SVD_img2vid.clip_vision_prefix
_SOURCE = "Use an SVD checkpoint, such as svd_xt.safetensors."

#: Sizes that shapes cannot tell, with SVD's own values: metadata of the file may give others.
METADATA_DEFAULTS = {"exvideo.num_head_channels": 64, "exvideo.clip_num_attention_heads": 16}

LoadedCheckpoint = tuple[comfy.model_patcher.ModelPatcher, comfy.clip_vision.ClipVisionModel, comfy.sd.VAE]


def load_checkpoint(path: str) -> LoadedCheckpoint:
    """Load an SVD checkpoint: diffusion model, CLIP vision model and VAE.

    Raises:
        ModelFileError: the file is not a complete SVD checkpoint.
    """
    if os.path.splitext(path)[1] != ".safetensors":
        raise ModelFileError(path, "is not a .safetensors file.", _SOURCE)
    header = read_header(path)
    shapes = header.shapes
    if f"{_UNET}input_blocks.1.1.time_stack.0.attn1.to_q.weight" not in shapes:
        raise ModelFileError(path, "is not a Stable Video Diffusion checkpoint.", _SOURCE)
    for part, key in (
        ("VAE", f"{_VAE}decoder.mid.block_1.mix_factor"),
        ("CLIP vision model", f"{_CLIP}conv1.weight"),
    ):
        if key not in shapes:
            raise ModelFileError(path, f"has no {part} of SVD's layout.", _SOURCE)

    config = comfy.model_detection.detect_unet_config({name: _Shape(shape) for name, shape in shapes.items()}, _UNET)
    if comfy.supported_models.SVD_img2vid.matches(config):
        model, _, vae, clip_vision = comfy.sd.load_checkpoint_guess_config(
            path, output_clip=False, output_clipvision=True
        )
        return model, clip_vision, vae
    sizes = {key: int(header.metadata.get(key, default)) for key, default in METADATA_DEFAULTS.items()}
    sd = comfy.utils.load_torch_file(path)
    clip_vision = _load_clip_vision(sd, sizes["exvideo.clip_num_attention_heads"])
    vae = _VideoVAE(comfy.utils.state_dict_prefix_replace(sd, {_VAE: ""}, filter_keys=True))
    model = _load_unet(sd, config, sizes["exvideo.num_head_channels"])
    model.cached_patcher_init = (_reload_unet, (path,))
    return model, clip_vision, vae


class _Shape:
    """Stands for a tensor where only its shape is read."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape


def _reload_unet(path: str, disable_dynamic: bool = False) -> comfy.model_patcher.ModelPatcher:
    """A fresh copy of the diffusion model, for the host's multi-GPU clones."""
    header = read_header(path)
    sd = comfy.utils.load_torch_file(path)
    config = comfy.model_detection.detect_unet_config(sd, _UNET)
    key = "exvideo.num_head_channels"
    return _load_unet(sd, config, int(header.metadata.get(key, METADATA_DEFAULTS[key])), disable_dynamic)


def _load_unet(
    sd: dict[str, torch.Tensor], unet_config: dict[str, Any], head_channels: int, disable_dynamic: bool = False
) -> comfy.model_patcher.ModelPatcher:
    management = comfy.model_management
    config = comfy.supported_models.SVD_img2vid(unet_config)
    config.unet_config["num_head_channels"] = head_channels
    parameters = comfy.utils.calculate_parameters(sd, _UNET)
    load_device = management.get_torch_device()
    supported = list(config.supported_inference_dtypes)
    dtype = management.unet_dtype(
        model_params=parameters, supported_dtypes=supported, weight_dtype=comfy.utils.weight_dtype(sd, _UNET)
    )
    config.set_inference_dtype(dtype, management.unet_manual_cast(dtype, load_device, supported))
    model = config.get_model(sd, _UNET, device=management.unet_inital_load_device(parameters, dtype))
    patcher_class = comfy.model_patcher.ModelPatcher
    if not disable_dynamic:  # 0.3.64 has one class only
        patcher_class = getattr(comfy.model_patcher, "CoreModelPatcher", patcher_class)
    patcher = patcher_class(model, load_device=load_device, offload_device=management.unet_offload_device())
    model.load_model_weights(sd, _UNET)
    return patcher


def _load_clip_vision(sd: dict[str, torch.Tensor], heads: int) -> comfy.clip_vision.ClipVisionModel:
    sd = comfy.clip_vision.convert_to_transformers(
        {key: value for key, value in sd.items() if key.startswith(_CLIP)}, _CLIP
    )
    patches = sd["vision_model.embeddings.patch_embedding.weight"]
    tokens = sd["vision_model.embeddings.position_embedding.weight"].shape[0]
    layers = {key.split(".")[3] for key in sd if key.startswith("vision_model.encoder.layers.")}
    config = {
        "model_type": "clip_vision_model",
        "hidden_act": "gelu",
        "hidden_size": patches.shape[0],
        "num_channels": patches.shape[1],
        "patch_size": patches.shape[2],
        "image_size": round((tokens - 1) ** 0.5) * patches.shape[2],
        "intermediate_size": sd["vision_model.encoder.layers.0.mlp.fc1.weight"].shape[0],
        "num_attention_heads": heads,
        "num_hidden_layers": len(layers),
        "projection_dim": sd["visual_projection.weight"].shape[0],
    }
    with tempfile.TemporaryDirectory() as folder:  # 0.3.64 takes the configuration as a file only
        path = os.path.join(folder, "clip_vision_config.json")
        with open(path, "w", encoding="utf-8") as file:
            json.dump(config, file)
        clip_vision = comfy.clip_vision.ClipVisionModel(path)
    missing, _ = clip_vision.load_sd(sd)
    if missing:
        logging.warning("CLIP vision model lacks %s", missing)
    return clip_vision


class _VideoVAE(comfy.sd.VAE):
    """The host's VAE around a temporal decoder of any width.

    Args:
        sd: weights of SVD's `AutoencodingEngine` (encoder, temporal decoder).
    """

    def __init__(self, sd: dict[str, torch.Tensor]) -> None:
        super().__init__(sd={})  # sets this host version's defaults, and logs that it was given no weights
        logging.info("The VAE comes from the ExVideo loader; the line above does not concern it.")
        management = comfy.model_management
        levels = len({key.split(".")[2] for key in sd if key.startswith("encoder.down.")})
        width = sd["encoder.conv_in.weight"].shape[0]
        config = {
            "double_z": True,
            "z_channels": sd["decoder.conv_in.weight"].shape[1],
            "resolution": 256,
            "in_channels": 3,
            "out_ch": 3,
            "ch": width,
            "ch_mult": [sd[f"encoder.down.{level}.block.0.conv2.weight"].shape[0] // width for level in range(levels)],
            "num_res_blocks": len({k.split(".")[4] for k in sd if k.startswith("encoder.down.0.block.")}),
            "attn_resolutions": [],
            "dropout": 0.0,
        }
        self.first_stage_model = AutoencodingEngine(
            regularizer_config={"target": "comfy.ldm.models.autoencoder.DiagonalGaussianRegularizer"},
            encoder_config={"target": "comfy.ldm.modules.diffusionmodules.model.Encoder", "params": config},
            decoder_config={
                "target": "comfy.ldm.modules.temporal_ae.VideoDecoder",
                "params": {**config, "video_kernel_size": [3, 1, 1], "alpha": 0.0},
            },
        ).eval()
        missing, _ = self.first_stage_model.load_state_dict(sd, strict=False)
        if missing:
            logging.warning("VAE lacks %s", missing)
        self.device = management.vae_device()
        self.vae_dtype = management.vae_dtype(self.device, self.working_dtypes)
        self.first_stage_model.to(self.vae_dtype)
        self.output_device = management.intermediate_device()
        patcher_class = getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)
        self.patcher = patcher_class(
            self.first_stage_model, load_device=self.device, offload_device=management.vae_offload_device()
        )
        self.size = management.module_size(self.first_stage_model)
