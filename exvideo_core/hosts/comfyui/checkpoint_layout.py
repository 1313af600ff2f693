"""What an SVD checkpoint has to hold: the sizes of its three parts, and every tensor that the host's classes need.

The host itself loads a file with missing tensors, leaves them as they happen to lie in memory, and says so in its log
only. Here the whole layout is checked against the host's classes before anything is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import comfy.clip_model
import comfy.clip_vision
import comfy.model_detection
import comfy.ops
import comfy.supported_models
import torch
from comfy.ldm.models.autoencoder import AutoencodingEngine

from ...layouts import METADATA_DEFAULTS
from ...safetensors_header import Header, ModelFileError

UNET = "model.diffusion_model."
VAE = "first_stage_model."
CLIP: str = comfy.supported_models.SVD_img2vid.clip_vision_prefix

_SOURCE = "Use an SVD checkpoint, such as svd_xt.safetensors."
_AGAIN = "It is incomplete, damaged or of another model: download it again."
_FLOATS = {"F8_E4M3", "F8_E5M2", "F16", "BF16", "F32", "F64"}


@dataclass(frozen=True)
class Sizes:
    """Configurations that build the host's classes for a checkpoint.

    Attributes:
        unet: as the host detects it, with the width of the attention heads.
        vae: of encoder and decoder.
        clip: of the image encoder, as in a `clip_vision_config.json`.
        is_svd: these are SVD's own sizes, which the host's loader knows.
    """

    unet: dict[str, Any]
    vae: dict[str, Any]
    clip: dict[str, Any]
    is_svd: bool


def read_sizes(path: str, header: Header) -> Sizes:
    """Sizes of a checkpoint of which every tensor is there and of the shape that they ask for.

    Raises:
        ModelFileError: it is no SVD checkpoint, or not a whole one.
    """
    shapes = header.shapes
    if f"{UNET}input_blocks.1.1.time_stack.0.attn1.to_q.weight" not in shapes:
        raise ModelFileError(path, "is not a Stable Video Diffusion checkpoint.", _SOURCE)
    for part, key in (
        ("VAE", f"{VAE}decoder.mid.block_1.mix_factor"),
        ("CLIP vision model", f"{CLIP}conv1.weight"),
    ):
        if key not in shapes:
            raise ModelFileError(path, f"has no {part} of SVD's layout.", _SOURCE)
    try:
        metas = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
        detected = comfy.model_detection.detect_unet_config(metas, UNET)
        is_svd = comfy.supported_models.SVD_img2vid.matches(detected)
        parts = {"UNet": _part(metas, UNET), "VAE": _part(metas, VAE), "CLIP vision model": converted_clip(metas)}
        given = {key: int(header.metadata.get(key, default)) for key, default in METADATA_DEFAULTS.items()}
        clip = _clip_sizes(parts["CLIP vision model"], given["exvideo.clip_num_attention_heads"])
        sizes = Sizes(
            {**detected, "num_head_channels": given["exvideo.num_head_channels"]},
            _vae_sizes(parts["VAE"]),
            clip,
            is_svd,
        )
        _check_heads(sizes)
        needed = {
            "UNet": unet_config(sizes.unet).get_model({}, device="meta").diffusion_model,
            "VAE": vae_model(sizes.vae, "meta"),
            "CLIP vision model": comfy.clip_model.CLIPVisionModelProjection(
                clip, torch.float32, "meta", comfy.ops.manual_cast
            ),
        }
    except Exception as error:  # the host's detection and classes raise anything on sizes that fit no SVD
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ModelFileError(path, f"has the sizes of no Stable Video Diffusion model ({reason}).", _AGAIN) from error
    for part, model in needed.items():
        _compare(path, part, model.state_dict(), parts[part])
    _check_dtypes(path, header)
    return sizes


def unet_config(sizes: Mapping[str, Any]) -> comfy.supported_models.SVD_img2vid:
    """The host's configuration of an SVD UNet of these sizes; its dtype is still to be chosen."""
    config = comfy.supported_models.SVD_img2vid(dict(sizes))
    config.unet_config["num_head_channels"] = sizes["num_head_channels"]  # the class puts SVD's own there
    config.set_inference_dtype(torch.float32, None)
    return config


def vae_model(sizes: dict[str, Any], device: str = "cpu") -> AutoencodingEngine:
    """The host's VAE with SVD's temporal decoder, of these sizes."""
    with torch.device(device):
        return AutoencodingEngine(
            regularizer_config={"target": "comfy.ldm.models.autoencoder.DiagonalGaussianRegularizer"},
            encoder_config={"target": "comfy.ldm.modules.diffusionmodules.model.Encoder", "params": sizes},
            decoder_config={
                "target": "comfy.ldm.modules.temporal_ae.VideoDecoder",
                "params": {**sizes, "video_kernel_size": [3, 1, 1], "alpha": 0.0},
            },
        )


def converted_clip(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The checkpoint's image encoder, named as the host's class has it."""
    kept = {key: value for key, value in tensors.items() if key.startswith(CLIP)}
    return comfy.clip_vision.convert_to_transformers(kept, CLIP)


def _part(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}


def _vae_sizes(tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    levels = len({name.split(".")[2] for name in tensors if name.startswith("encoder.down.")})
    width = tensors["encoder.conv_in.weight"].shape[0]
    ends = [tensors[f"encoder.down.{level}.block.0.conv2.weight"].shape[0] for level in range(levels)]
    return {
        "double_z": True,
        "z_channels": tensors["decoder.conv_in.weight"].shape[1],
        "resolution": 256,
        "in_channels": 3,
        "out_ch": 3,
        "ch": width,
        "ch_mult": [end // width for end in ends],
        "num_res_blocks": len({name.split(".")[4] for name in tensors if name.startswith("encoder.down.0.block.")}),
        "attn_resolutions": [],
        "dropout": 0.0,
    }


def _clip_sizes(tensors: Mapping[str, torch.Tensor], heads: int) -> dict[str, Any]:
    patches = tensors["vision_model.embeddings.patch_embedding.weight"]
    tokens = tensors["vision_model.embeddings.position_embedding.weight"].shape[0]
    layers = {name.split(".")[3] for name in tensors if name.startswith("vision_model.encoder.layers.")}
    return {
        "model_type": "clip_vision_model",
        "hidden_act": "gelu",
        "hidden_size": patches.shape[0],
        "num_channels": patches.shape[1],
        "patch_size": patches.shape[2],
        "image_size": round((tokens - 1) ** 0.5) * patches.shape[2],
        "intermediate_size": tensors["vision_model.encoder.layers.0.mlp.fc1.weight"].shape[0],
        "num_attention_heads": heads,
        "num_hidden_layers": len(layers),
        "projection_dim": tensors["visual_projection.weight"].shape[0],
    }


def _check_heads(sizes: Sizes) -> None:
    channels, heads = sizes.unet["num_head_channels"], sizes.clip["num_attention_heads"]
    for what, width, part in (
        ("channels a head", sizes.unet["model_channels"], channels),
        ("heads", sizes.clip["hidden_size"], heads),
    ):
        if part < 1 or width % part:
            raise ValueError(f"{part} {what} at a width of {width}")


def _compare(path: str, part: str, expected: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor]) -> None:
    missing = sorted(expected.keys() - found.keys())
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ModelFileError(path, f"lacks {missing[0]}{more} of the {part}.", _AGAIN)
    for name, tensor in expected.items():
        if found[name].shape != tensor.shape:
            shapes = f"{list(found[name].shape)}, expected {list(tensor.shape)}"
            raise ModelFileError(path, f"has {name} of the {part} of shape {shapes}.", _AGAIN)


def _check_dtypes(path: str, header: Header) -> None:
    for name, dtype in header.dtypes.items():
        if name.startswith((UNET, VAE, CLIP)) and dtype not in _FLOATS:
            raise ModelFileError(path, f"holds {name} as {dtype}.", "Use a file in fp16, bf16 or fp32.")
