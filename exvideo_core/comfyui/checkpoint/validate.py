"""Reads the sizes of an SVD checkpoint's three parts and checks every tensor that ComfyUI's classes need.

ComfyUI loads files with missing tensors, leaves these weights uninitialized, and reports it only in the log. Here the
whole layout is checked against ComfyUI's classes before anything is loaded.

The image encoder has OpenCLIP's names, as published, or those of transformers, as saved by ComfyUI. Saving drops the
metadata, so `AnyWidthSVD` and the loader's image encoder store the numbers of attention heads as tensors instead.
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

from ...files.safetensors_header import Header, ModelFileError
from ...method.tensor_names import METADATA_DEFAULTS

UNET = "model.diffusion_model."
VAE = "first_stage_model."
CLIP: str = comfy.supported_models.SVD_img2vid.clip_vision_prefix

_SOURCE = "Use an SVD checkpoint, such as svd_xt.safetensors."
_AGAIN = "It is incomplete, corrupted or belongs to another model. Download it again."
#: The published sizes, the only ones that ComfyUI's loader recognizes.
_SVD_CHANNELS = 320
_SVD_CLIP_WIDTH = 1280
_SVD_VAE = {"ch": 128, "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2}
_SVD_CLIP = {"hidden_size": _SVD_CLIP_WIDTH, "intermediate_size": 5120, "num_hidden_layers": 32, "patch_size": 14,
             "image_size": 224, "num_attention_heads": 16, "projection_dim": 1024}  # fmt: skip
_FLOATS = {"F8_E4M3", "F8_E5M2", "F16", "BF16", "F32", "F64"}

HEAD_CHANNELS = "exvideo.num_head_channels"
CLIP_HEADS = "exvideo.clip_num_attention_heads"
#: The tensors that store them in files saved by ComfyUI.
_SAVED_AS = {HEAD_CHANNELS: f"{UNET}{HEAD_CHANNELS}", CLIP_HEADS: f"{CLIP}{CLIP_HEADS}"}


class AnyWidthSVD(comfy.supported_models.SVD_img2vid):
    """ComfyUI's configuration of SVD, which also saves the width of the attention heads: shapes do not show it."""

    def process_unet_state_dict_for_saving(self, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        heads = torch.tensor(float(self.unet_config["num_head_channels"]))
        return super().process_unet_state_dict_for_saving({**state_dict, HEAD_CHANNELS: heads})


@dataclass(frozen=True)
class Sizes:
    """Configurations of ComfyUI's classes for a checkpoint.

    Attributes:
        unet: as detected by ComfyUI, plus the width of the attention heads.
        vae: parameters of encoder and decoder.
        clip_vision: of the image encoder, as in a `clip_vision_config.json`.
        is_published: whether all sizes are those of the published SVD, which ComfyUI's loader recognizes.
    """

    unet: dict[str, Any]
    vae: dict[str, Any]
    clip_vision: dict[str, Any]
    is_published: bool


def read_sizes(path: str, header: Header) -> Sizes:
    """Read the sizes of a checkpoint, and check that all tensors are present with matching shapes.

    Raises:
        ModelFileError: the file is not an SVD checkpoint, or not a complete one.
    """
    shapes = header.shapes
    if f"{UNET}input_blocks.1.1.time_stack.0.attn1.to_q.weight" not in shapes:
        raise ModelFileError(path, "is not a Stable Video Diffusion checkpoint.", _SOURCE)
    _check_parts(path, shapes)
    heads = _heads(path, header)
    try:
        metas = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
        detected = comfy.model_detection.detect_unet_config(metas, UNET)
        parts = {"UNet": _part(metas, UNET), "VAE": _part(metas, VAE), "CLIP vision model": clip_vision_weights(metas)}
        heads = {key: int(value) for key, value in heads.items()}
        unet = {**detected, "num_head_channels": heads[HEAD_CHANNELS], "channel_mult": _multiples(parts["UNet"])}
        vae = _vae_sizes(parts["VAE"])
        clip_vision = _clip_vision_sizes(parts["CLIP vision model"], heads[CLIP_HEADS])
        sizes = Sizes(unet, vae, clip_vision, _is_published(detected, heads[HEAD_CHANNELS], vae, clip_vision))
        _check_heads(sizes)
        needed = {
            "UNet": unet_config(sizes.unet).get_model({}, device="meta").diffusion_model,
            "VAE": build_vae(sizes.vae, "meta"),
            "CLIP vision model": comfy.clip_model.CLIPVisionModelProjection(
                clip_vision, torch.float32, "meta", comfy.ops.manual_cast
            ),
        }
    except Exception as error:  # ComfyUI's detection and classes raise all kinds of errors on wrong sizes
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ModelFileError(
            path, f"does not have the sizes of a Stable Video Diffusion model ({reason}).", _AGAIN
        ) from error
    for part, model in needed.items():
        _compare(path, part, model.state_dict(), parts[part])
    _check_dtypes(path, header)
    return sizes


def unet_config(sizes: Mapping[str, Any]) -> AnyWidthSVD:
    """ComfyUI's configuration of an SVD UNet of these sizes; the caller chooses the inference dtype."""
    config = AnyWidthSVD(dict(sizes))
    config.unet_config["num_head_channels"] = sizes["num_head_channels"]  # the class sets SVD's default
    config.set_inference_dtype(torch.float32, None)
    return config


def build_vae(sizes: dict[str, Any], device: str = "cpu") -> AutoencodingEngine:
    """Build ComfyUI's VAE with SVD's temporal decoder in these sizes."""
    with torch.device(device):
        return AutoencodingEngine(
            regularizer_config={"target": "comfy.ldm.models.autoencoder.DiagonalGaussianRegularizer"},
            encoder_config={"target": "comfy.ldm.modules.diffusionmodules.model.Encoder", "params": sizes},
            decoder_config={
                "target": "comfy.ldm.modules.temporal_ae.VideoDecoder",
                "params": {**sizes, "video_kernel_size": [3, 1, 1], "alpha": 0.0},
            },
        )


def clip_vision_weights(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights of a checkpoint's image encoder in either layout, renamed for ComfyUI's class."""
    kept = {key: value for key, value in tensors.items() if key.startswith(CLIP)}
    return comfy.clip_vision.convert_to_transformers(kept, CLIP)


def _check_parts(path: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Reject a file without a temporal VAE or an image encoder."""
    decoder = f"{VAE}decoder."
    if f"{decoder}mid.block_1.mix_factor" not in shapes:
        if f"{decoder}conv_in.weight" in shapes:
            raise ModelFileError(
                path,
                "has a VAE that decodes single images, without SVD's temporal layers (like svd_xt_image_decoder).",
                "Use svd_xt.safetensors, or load this file with ComfyUI's node 'Load Checkpoint Image Only (img2vid "
                "model)' (in older versions 'Image Only Checkpoint Loader (img2vid model)').",
            )
        raise ModelFileError(path, "has no VAE with SVD's layout.", _SOURCE)
    if not {f"{CLIP}conv1.weight", f"{CLIP}vision_model.embeddings.patch_embedding.weight"} & shapes.keys():
        raise ModelFileError(path, "has no CLIP vision model with SVD's layout.", _SOURCE)


def _heads(path: str, header: Header) -> dict[str, Any]:
    """Read the numbers of attention heads, by the keys of `METADATA_DEFAULTS`.

    Taken from the metadata, else from the tensors that ComfyUI saves, else SVD's defaults. A narrower model that was
    saved without these tensors is rejected: it would run with the wrong number of heads.
    """
    from safetensors import safe_open

    found: dict[str, Any] = {}
    with safe_open(path, framework="pt") as file:
        for key, name in _SAVED_AS.items():
            if key in header.metadata:
                found[key] = header.metadata[key]
            elif header.shapes.get(name) == ():
                found[key] = file.get_tensor(name).item()
    shapes = header.shapes
    saved_by_comfyui = f"{CLIP}conv1.weight" not in shapes
    for key, what, name, width in (
        (HEAD_CHANNELS, "channels per attention head of the UNet", f"{UNET}input_blocks.0.0.weight", _SVD_CHANNELS),
        (
            CLIP_HEADS,
            "attention heads of the CLIP vision model",
            f"{CLIP}vision_model.pre_layrnorm.weight",
            _SVD_CLIP_WIDTH,
        ),
    ):
        if saved_by_comfyui and key not in found and shapes.get(name, (width,))[:1] != (width,):
            raise ModelFileError(
                path,
                f"does not give the number of {what}, which a model of this width needs.",
                "Load the original with Load SVD Checkpoint (ExVideo) and save it again.",
            )
    return {**METADATA_DEFAULTS, **found}


def _is_published(
    detected: dict[str, Any], head_channels: int, vae: dict[str, Any], clip_vision: dict[str, Any]
) -> bool:
    """Whether every part has the sizes of the published SVD."""
    return (
        comfy.supported_models.SVD_img2vid.matches(detected)
        and head_channels == METADATA_DEFAULTS[HEAD_CHANNELS]
        and all(vae[key] == value for key, value in _SVD_VAE.items())
        and all(clip_vision[key] == value for key, value in _SVD_CLIP.items())
    )


def _part(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}


class _Multiple(float):
    """Width of a level as a multiple of the first level's. ComfyUI's class needs integers as products of channels."""

    def __mul__(self, channels: float) -> int:  # type: ignore[override]
        return round(float(self) * channels)

    __rmul__ = __mul__


def _multiples(tensors: Mapping[str, torch.Tensor]) -> list[float]:
    """Width of each level of the UNet as a multiple of the first one's, which ComfyUI only detects from 1 up."""
    first = tensors["input_blocks.0.0.weight"].shape[0]
    found: list[float] = []
    begins = True
    for block in range(1, len({name.split(".")[1] for name in tensors if name.startswith("input_blocks.")})):
        if f"input_blocks.{block}.0.op.weight" in tensors:
            begins = True
        elif begins:
            width = tensors[f"input_blocks.{block}.0.out_layers.3.weight"].shape[0]
            found.append(width // first if width % first == 0 else _Multiple(width / first))
            begins = False
    return found


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


def _clip_vision_sizes(tensors: Mapping[str, torch.Tensor], heads: int) -> dict[str, Any]:
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
    channels, heads = sizes.unet["num_head_channels"], sizes.clip_vision["num_attention_heads"]
    for what, width, part in (
        ("channels per head", sizes.unet["model_channels"], channels),
        ("heads", sizes.clip_vision["hidden_size"], heads),
    ):
        if part < 1 or width % part:
            raise ValueError(f"{part} {what} at a width of {width}")


def _compare(path: str, part: str, expected: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor]) -> None:
    missing = sorted(expected.keys() - found.keys())
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ModelFileError(path, f"is missing {missing[0]}{more} of the {part}.", _AGAIN)
    for name, tensor in expected.items():
        if found[name].shape != tensor.shape:
            shapes = f"{list(found[name].shape)}, expected {list(tensor.shape)}"
            raise ModelFileError(path, f"has {name} of the {part} with shape {shapes}.", _AGAIN)


def _check_dtypes(path: str, header: Header) -> None:
    for name, dtype in header.dtypes.items():
        if name.startswith((UNET, VAE, CLIP)) and dtype not in _FLOATS:
            raise ModelFileError(path, f"stores {name} as {dtype}.", "Use a file in fp16, bf16 or fp32.")
