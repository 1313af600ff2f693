"""Converts the names of SVD's weights between single-file checkpoints and diffusers, without loss.

A single file contains `model.diffusion_model.` (UNet), `first_stage_model.` (VAE) and
`conditioner.embedders.0.open_clip.model.visual.` (image encoder); diffusers keeps each in a separate folder. The names
are derived from the model's structure (levels and layers per level), so they apply to SVD models of any size.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

import torch

UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."
CLIP_PREFIX = "conditioner.embedders.0.open_clip.model.visual."

#: Names in diffusers' UNet of the transformers, in the order of `tensor_names.SVD_TRANSFORMERS`.
TRANSFORMERS: tuple[str, ...] = (
    *(f"down_blocks.{level}.attentions.{layer}" for level in range(3) for layer in range(2)),
    "mid_block.attentions.0",
    *(f"up_blocks.{level}.attentions.{layer}" for level in range(1, 4) for layer in range(3)),
)

_RES_PARTS = (
    ("in_layers.0", "norm1"),
    ("in_layers.2", "conv1"),
    ("emb_layers.1", "time_emb_proj"),
    ("out_layers.0", "norm2"),
    ("out_layers.3", "conv2"),
    ("skip_connection", "conv_shortcut"),
)
_TRANSFORMER_PARTS = (
    ("time_stack.0", "temporal_transformer_blocks.0"),
    ("time_pos_embed.0", "time_pos_embed.linear_1"),
    ("time_pos_embed.2", "time_pos_embed.linear_2"),
    *((name, name) for name in ("norm", "proj_in", "proj_out", "transformer_blocks.0", "time_mixer")),
)
_LAYERS, _LEVELS = 2, 4  # of SVD's UNet


def _res_block(svd: str, diffusers: str) -> Iterator[tuple[str, str]]:
    for theirs, ours in _RES_PARTS:
        yield f"{svd}.{theirs}", f"{diffusers}.spatial_res_block.{ours}"
        yield f"{svd}.time_stack.{theirs}", f"{diffusers}.temporal_res_block.{ours}"
    yield f"{svd}.time_mixer", f"{diffusers}.time_mixer"


def _transformer(svd: str, diffusers: str) -> Iterator[tuple[str, str]]:
    for theirs, ours in _TRANSFORMER_PARTS:
        yield f"{svd}.{theirs}", f"{diffusers}.{ours}"


def _unet_modules() -> Iterator[tuple[str, str]]:
    """(module in the SVD checkpoint, the same module in diffusers)."""
    yield "input_blocks.0.0", "conv_in"
    for block, name in (("time_embed", "time_embedding"), ("label_emb.0", "add_embedding")):
        yield f"{block}.0", f"{name}.linear_1"
        yield f"{block}.2", f"{name}.linear_2"
    for level in range(_LEVELS):
        first = 1 + level * (_LAYERS + 1)
        for layer in range(_LAYERS):
            yield from _res_block(f"input_blocks.{first + layer}.0", f"down_blocks.{level}.resnets.{layer}")
            yield from _transformer(f"input_blocks.{first + layer}.1", f"down_blocks.{level}.attentions.{layer}")
        yield f"input_blocks.{first + _LAYERS}.0.op", f"down_blocks.{level}.downsamplers.0.conv"
    yield from _res_block("middle_block.0", "mid_block.resnets.0")
    yield from _transformer("middle_block.1", "mid_block.attentions.0")
    yield from _res_block("middle_block.2", "mid_block.resnets.1")
    for level in range(_LEVELS):
        first = level * (_LAYERS + 1)
        for layer in range(_LAYERS + 1):
            yield from _res_block(f"output_blocks.{first + layer}.0", f"up_blocks.{level}.resnets.{layer}")
            if level:
                yield from _transformer(f"output_blocks.{first + layer}.1", f"up_blocks.{level}.attentions.{layer}")
        index = 2 if level else 1  # the first level has no transformer before its upsampler
        yield f"output_blocks.{first + _LAYERS}.{index}.conv", f"up_blocks.{level}.upsamplers.0.conv"
    yield "out.0", "conv_norm_out"
    yield "out.2", "conv_out"


def _vae_res_block(svd: str, diffusers: str, temporal: bool) -> Iterator[tuple[str, str]]:
    spatial = f"{diffusers}.spatial_res_block" if temporal else diffusers
    for part in ("norm1", "conv1", "norm2", "conv2"):
        yield f"{svd}.{part}", f"{spatial}.{part}"
    yield f"{svd}.nin_shortcut", f"{spatial}.conv_shortcut"
    if temporal:
        for theirs, ours in _RES_PARTS:
            yield f"{svd}.time_stack.{theirs}", f"{diffusers}.temporal_res_block.{ours}"
        yield svd, f"{diffusers}.time_mixer"  # mix_factor is a parameter of the block itself


def _vae_modules(levels: int, layers: int) -> Iterator[tuple[str, str]]:
    for half, temporal in (("encoder", False), ("decoder", True)):
        yield f"{half}.conv_in", f"{half}.conv_in"
        yield f"{half}.norm_out", f"{half}.conv_norm_out"
        yield f"{half}.conv_out", f"{half}.conv_out"
        for index in (1, 2):
            yield from _vae_res_block(f"{half}.mid.block_{index}", f"{half}.mid_block.resnets.{index - 1}", temporal)
        attention = f"{half}.mid_block.attentions.0"
        for theirs, ours in (
            ("norm", "group_norm"),
            ("q", "to_q"),
            ("k", "to_k"),
            ("v", "to_v"),
            ("proj_out", "to_out.0"),
        ):
            yield f"{half}.mid.attn_1.{theirs}", f"{attention}.{ours}"
    for level in range(levels):
        for layer in range(layers):
            down = f"encoder.down_blocks.{level}"
            yield from _vae_res_block(f"encoder.down.{level}.block.{layer}", f"{down}.resnets.{layer}", False)
        yield f"encoder.down.{level}.downsample.conv", f"encoder.down_blocks.{level}.downsamplers.0.conv"
        up = f"decoder.up_blocks.{levels - 1 - level}"  # the checkpoint counts from the finest level
        for layer in range(layers + 1):
            yield from _vae_res_block(f"decoder.up.{level}.block.{layer}", f"{up}.resnets.{layer}", True)
        yield f"decoder.up.{level}.upsample.conv", f"{up}.upsamplers.0.conv"
    yield "decoder.conv_out.time_mix_conv", "decoder.time_conv_out"


def _split(name: str) -> tuple[str, str]:
    module, _, parameter = name.rpartition(".")
    return module, parameter


def _rename(tensors: Mapping[str, torch.Tensor], modules: Mapping[str, str], what: str) -> dict[str, torch.Tensor]:
    """Replace the longest known module prefix of every name."""
    renamed, unknown = {}, []
    for name, tensor in tensors.items():
        module, tail = _split(name)
        while module and module not in modules:
            module, part = _split(module)
            tail = f"{part}.{tail}"
        if not module:
            unknown.append(name)
        else:
            renamed[f"{modules[module]}.{tail}"] = tensor
    if unknown:
        raise ValueError(f"Not the {what} of an SVD model: it has {len(unknown)} unknown tensors ({unknown[0]}, ...).")
    return renamed


def unet_to_diffusers(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Convert UNet weights (names under `model.diffusion_model.`) to diffusers' `UNetSpatioTemporalConditionModel`.

    Raises:
        ValueError: there are unknown tensors.
    """
    return _rename(tensors, dict(_unet_modules()), "UNet")


def unet_to_svd(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Inverse of `unet_to_diffusers`."""
    return _rename(tensors, {ours: theirs for theirs, ours in _unet_modules()}, "UNet")


def _count(names: Iterable[str], pattern: str) -> int:
    found = [int(match[1]) for name in names if (match := re.match(pattern, name))]
    return 1 + max(found, default=-1)


def vae_to_diffusers(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Convert VAE weights (names under `first_stage_model.`) to diffusers' `AutoencoderKLTemporalDecoder`.

    diffusers' class has an additional layer between encoder and latents, `quant_conv`, which becomes an identity.

    Raises:
        ValueError: there are unknown tensors, or layers that diffusers' class cannot represent.
    """
    levels = _count(tensors, r"encoder\.down\.(\d+)\.")
    layers = _count(tensors, r"encoder\.down\.0\.block\.(\d+)\.")
    if layers == 1:
        tensors = _without_second_half(tensors)
    renamed = _rename(tensors, dict(_vae_modules(levels, layers)), "VAE")
    for name, tensor in renamed.items():
        if ".attentions." in name and tensor.ndim == 4:  # 1x1 convolutions become linear layers
            renamed[name] = tensor[:, :, 0, 0]
    moments = renamed["encoder.conv_out.bias"]
    if "quant_conv.weight" not in renamed:
        renamed["quant_conv.weight"] = torch.eye(len(moments), dtype=moments.dtype)[:, :, None, None]
        renamed["quant_conv.bias"] = torch.zeros_like(moments)
    return renamed


def vae_to_svd(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Inverse of `vae_to_diffusers`.

    Raises:
        ValueError: `quant_conv` is not an identity, so a checkpoint cannot store it.
    """
    weight, bias = tensors["quant_conv.weight"], tensors["quant_conv.bias"]
    if not torch.equal(weight[:, :, 0, 0], torch.eye(len(bias)).to(weight)) or bias.any():
        raise ValueError("This VAE's quant_conv is not an identity, so an SVD checkpoint cannot store it.")
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("quant_conv.")}
    levels = _count(kept, r"encoder\.down_blocks\.(\d+)\.")
    layers = _count(kept, r"encoder\.down_blocks\.0\.resnets\.(\d+)\.")
    renamed = _rename(kept, {ours: theirs for theirs, ours in _vae_modules(levels, layers)}, "VAE")
    for name, tensor in renamed.items():
        if ".attn_1." in name and ".norm." not in name and tensor.ndim == 2:
            renamed[name] = tensor[:, :, None, None]
    if layers == 1:
        renamed |= _idle_second_half(renamed)
    return renamed


# With one layer per level, the middle of diffusers' decoder consists of its first block only. SVD's decoder always has
# attention and a second block, which are saved with zeros in their last layers, so that they add nothing.
_SECOND_BLOCK = "decoder.mid.block_2."
_LAST = ("decoder.mid.attn_1.proj_out.", f"{_SECOND_BLOCK}conv2.", f"{_SECOND_BLOCK}time_stack.out_layers.3.")


def _idle_second_half(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    first = "decoder.mid.block_1."
    idle = {_SECOND_BLOCK + name[len(first) :]: value for name, value in tensors.items() if name.startswith(first)}
    idle |= {name: value for name, value in tensors.items() if name.startswith(_LAST[0])}
    return {name: torch.zeros_like(value) if name.startswith(_LAST) else value.clone() for name, value in idle.items()}


def _without_second_half(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    if any(value.any() for name, value in tensors.items() if name.startswith(_LAST)):
        raise ValueError(
            "With one layer per level, diffusers' VAE has no attention or second block in the middle of its decoder."
        )
    return {name: value for name, value in tensors.items() if not name.startswith(_SECOND_BLOCK)}


_CLIP_TOP = (
    ("conv1.weight", "embeddings.patch_embedding.weight"),
    ("class_embedding", "embeddings.class_embedding"),
    ("positional_embedding", "embeddings.position_embedding.weight"),
    *((f"ln_pre.{p}", f"pre_layrnorm.{p}") for p in ("weight", "bias")),
    *((f"ln_post.{p}", f"post_layernorm.{p}") for p in ("weight", "bias")),
)
_CLIP_LAYER = tuple(
    (f"{theirs}.{p}", f"{ours}.{p}")
    for theirs, ours in (
        ("ln_1", "layer_norm1"),
        ("ln_2", "layer_norm2"),
        ("mlp.c_fc", "mlp.fc1"),
        ("mlp.c_proj", "mlp.fc2"),
        ("attn.out_proj", "self_attn.out_proj"),
    )
    for p in ("weight", "bias")
)
_QKV = ("q_proj", "k_proj", "v_proj")


def _clip_names(layers: int) -> dict[str, str]:
    names = {theirs: f"vision_model.{ours}" for theirs, ours in _CLIP_TOP}
    for layer in range(layers):
        theirs, ours = f"transformer.resblocks.{layer}.", f"vision_model.encoder.layers.{layer}."
        names |= {theirs + a: ours + b for a, b in _CLIP_LAYER}
    return names


def clip_to_transformers(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Convert OpenCLIP's vision tower to transformers' `CLIPVisionModelWithProjection`."""
    layers = _count(tensors, r"transformer\.resblocks\.(\d+)\.")
    renamed = {ours: tensors[theirs] for theirs, ours in _clip_names(layers).items()}
    renamed["visual_projection.weight"] = tensors["proj"].T.contiguous()
    for layer in range(layers):
        for parameter in ("weight", "bias"):
            fused = tensors[f"transformer.resblocks.{layer}.attn.in_proj_{parameter}"]
            for part, name in zip(fused.chunk(3), _QKV, strict=True):
                renamed[f"vision_model.encoder.layers.{layer}.self_attn.{name}.{parameter}"] = part.clone()
    return renamed


def clip_to_svd(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Inverse of `clip_to_transformers`."""
    layers = _count(tensors, r"vision_model\.encoder\.layers\.(\d+)\.")
    renamed = {theirs: tensors[ours] for theirs, ours in _clip_names(layers).items()}
    renamed["proj"] = tensors["visual_projection.weight"].T.contiguous()
    for layer in range(layers):
        for parameter in ("weight", "bias"):
            parts = [tensors[f"vision_model.encoder.layers.{layer}.self_attn.{n}.{parameter}"] for n in _QKV]
            renamed[f"transformer.resblocks.{layer}.attn.in_proj_{parameter}"] = torch.cat(parts)
    return renamed
