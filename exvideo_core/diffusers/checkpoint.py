"""Loads and saves SVD of any size, as a single file or a diffusers folder."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKLTemporalDecoder, UNetSpatioTemporalConditionModel
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from ..files.safetensors_header import ModelFileError, read_header
from ..method.tensor_names import METADATA_DEFAULTS
from . import names

SCALING_FACTOR = 0.18215  # of SVD's VAE
_SOURCE = "Use an SVD checkpoint, such as svd_xt.safetensors, or a diffusers folder."


@dataclass(frozen=True)
class SVD:
    """A Stable Video Diffusion model in classes of diffusers and transformers."""

    unet: UNetSpatioTemporalConditionModel
    vae: AutoencoderKLTemporalDecoder
    image_encoder: CLIPVisionModelWithProjection

    @property
    def frames(self) -> int:
        """Number of frames that the model was trained for."""
        return int(self.unet.config.num_frames)


def load(path: str | os.PathLike[str]) -> SVD:
    """Load SVD from a single safetensors file or a diffusers folder, onto the CPU.

    Single files are converted to float32.

    Raises:
        ModelFileError: `path` is neither, or is incomplete.
    """
    return _load_folder(Path(path)) if os.path.isdir(path) else _load_file(path)


def _load_folder(path: Path) -> SVD:
    try:
        return SVD(
            UNetSpatioTemporalConditionModel.from_pretrained(path, subfolder="unet", local_files_only=True),
            AutoencoderKLTemporalDecoder.from_pretrained(path, subfolder="vae", local_files_only=True),
            CLIPVisionModelWithProjection.from_pretrained(path, subfolder="image_encoder", local_files_only=True),
        )
    except (OSError, ValueError) as error:
        raise ModelFileError(path, f"is not a diffusers folder of SVD: {error}.", _SOURCE) from error


def _load_file(path: str | os.PathLike[str]) -> SVD:
    from safetensors.torch import load_file

    header = read_header(path)
    sizes = {key: int(header.metadata.get(key, default)) for key, default in METADATA_DEFAULTS.items()}
    tensors = load_file(path)
    parts = {
        prefix: {name[len(prefix) :]: value.float() for name, value in tensors.items() if name.startswith(prefix)}
        for prefix in (names.UNET_PREFIX, names.VAE_PREFIX, names.CLIP_PREFIX)
    }
    try:
        unet = _unet(parts[names.UNET_PREFIX], sizes["exvideo.num_head_channels"])
        vae = _vae(parts[names.VAE_PREFIX])
        encoder = _image_encoder(parts[names.CLIP_PREFIX], sizes["exvideo.clip_num_attention_heads"])
    except (KeyError, ValueError, RuntimeError) as error:
        raise ModelFileError(path, f"is not a complete SVD checkpoint ({error}).", _SOURCE) from error
    return SVD(unet, vae, encoder)


def _unet(tensors: Mapping[str, torch.Tensor], head_channels: int) -> UNetSpatioTemporalConditionModel:
    widths = tuple(tensors[f"input_blocks.{i}.0.out_layers.3.weight"].shape[0] for i in (1, 4, 7, 10))
    if any(width % head_channels for width in widths):
        raise ValueError(f"widths {widths} are not multiples of {head_channels} channels per attention head; "
                         "set 'exvideo.num_head_channels' in the file's metadata")  # fmt: skip
    unet = UNetSpatioTemporalConditionModel(
        in_channels=tensors["input_blocks.0.0.weight"].shape[1],
        out_channels=tensors["out.2.weight"].shape[0],
        block_out_channels=widths,
        num_attention_heads=tuple(width // head_channels for width in widths),
        cross_attention_dim=tensors["middle_block.1.transformer_blocks.0.attn2.to_k.weight"].shape[1],
        addition_time_embed_dim=tensors["label_emb.0.0.weight"].shape[1] // 3,
        projection_class_embeddings_input_dim=tensors["label_emb.0.0.weight"].shape[1],
        num_frames=25,
    )
    unet.load_state_dict(names.unet_to_diffusers(tensors))
    return unet.eval()


def _vae(tensors: Mapping[str, torch.Tensor]) -> AutoencoderKLTemporalDecoder:
    renamed = names.vae_to_diffusers(tensors)
    levels = [name for name in tensors if name.startswith("encoder.down.") and name.endswith(".block.0.conv2.weight")]
    widths = tuple(tensors[name].shape[0] for name in sorted(levels))
    layers = sum(name.startswith("encoder.down.0.block.") and name.endswith("conv1.weight") for name in tensors)
    vae = AutoencoderKLTemporalDecoder(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        layers_per_block=layers,
        scaling_factor=SCALING_FACTOR,
    )
    vae.load_state_dict(renamed)
    return vae.eval()


def _image_encoder(tensors: Mapping[str, torch.Tensor], heads: int) -> CLIPVisionModelWithProjection:
    renamed = names.clip_to_transformers(tensors)
    patches = renamed["vision_model.embeddings.patch_embedding.weight"]
    tokens = renamed["vision_model.embeddings.position_embedding.weight"].shape[0]
    encoder = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=patches.shape[0],
            intermediate_size=renamed["vision_model.encoder.layers.0.mlp.fc1.weight"].shape[0],
            num_hidden_layers=sum(name.endswith(".mlp.fc1.weight") for name in renamed),
            num_attention_heads=heads,
            image_size=round((tokens - 1) ** 0.5) * patches.shape[2],
            patch_size=patches.shape[2],
            projection_dim=renamed["visual_projection.weight"].shape[0],
            hidden_act="gelu",
        )
    )
    missing, unexpected = encoder.load_state_dict(renamed, strict=False)
    if unexpected or any("position_ids" not in name for name in missing):
        raise ValueError(f"image encoder: missing {missing}, unexpected {unexpected}")
    return encoder.eval()


def save(model: SVD, path: str | os.PathLike[str], dtype: torch.dtype = torch.float16) -> None:
    """Save a model as a single file in the original SVD layout, which ComfyUI reads.

    Args:
        model: the model, without an extension; save that with `patch.collect(unet).save(path)`.
        path: the file.
        dtype: dtype of the weights in the file.

    Raises:
        ValueError: the UNet has an extension, or its attention heads differ in width.
    """
    from safetensors.torch import save_file

    tensors: dict[str, torch.Tensor] = {}
    for prefix, part in (
        (names.UNET_PREFIX, names.unet_to_svd(model.unet.state_dict())),
        (names.VAE_PREFIX, names.vae_to_svd(model.vae.state_dict())),
        (names.CLIP_PREFIX, names.clip_to_svd(model.image_encoder.state_dict())),
    ):
        tensors |= {prefix + name: value.to("cpu", dtype).contiguous() for name, value in part.items()}
    heads = model.unet.config.num_attention_heads
    widths = model.unet.config.block_out_channels
    per_level = heads if isinstance(heads, (tuple, list)) else (heads,) * len(widths)
    channels = {width // number for width, number in zip(widths, per_level, strict=True)}
    if len(channels) > 1:
        raise ValueError(
            f"The UNet has heads of {sorted(channels)} channels, but an SVD file can store only one width."
        )
    metadata = {
        "exvideo.num_head_channels": str(channels.pop()),
        "exvideo.clip_num_attention_heads": str(model.image_encoder.config.num_attention_heads),
    }
    part = f"{os.fspath(path)}.part"
    save_file(tensors, part, metadata)
    os.replace(part, path)
