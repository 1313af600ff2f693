"""Narrow CogVideoX and Wan models with random weights, in the layouts of DiffSynth and diffusers."""

from __future__ import annotations

import re
import types
from pathlib import Path

import torch
from safetensors.torch import save_file

import reference

DIM, HEADS, LAYERS, TEXT = 128, 2, 2, 64
RANK = 4
#: Arguments of diffusers' `CogVideoXTransformer3DModel` for the same sizes.
DIFFUSERS = {
    "num_attention_heads": HEADS,
    "attention_head_dim": DIM // HEADS,
    "in_channels": 16,
    "out_channels": 16,
    "time_embed_dim": 512,
    "text_embed_dim": TEXT,
    "num_layers": LAYERS,
    "sample_width": 90,
    "sample_height": 60,
    "sample_frames": 49,
    "use_rotary_positional_embeddings": True,
    "use_learned_positional_embeddings": False,
}


def reference_model(seed: int = 0) -> torch.nn.Module:
    """DiffSynth's `CogDiT`, narrow, with random weights."""
    module = _narrow_module()
    torch.manual_seed(seed)
    model = module.CogDiT().eval()
    randomize(model)
    return model


def _narrow_module() -> types.ModuleType:
    """DiffSynth's `cog_dit` with smaller literals."""
    original = reference.module("models.cog_dit")
    source = Path(str(original.__file__)).read_text(encoding="utf-8")
    for literal, narrow in (("3072", DIM), ("48", HEADS), ("42", LAYERS), ("4096", TEXT)):
        source, count = re.subn(rf"(?<![\d/]){literal}(?!\d)", str(narrow), source)
        assert count, f"cog_dit has no {literal} any more"
    narrowed = types.ModuleType(original.__name__ + "_narrow")
    narrowed.__package__ = original.__package__
    narrowed.__file__ = original.__file__
    exec(compile(source, str(original.__file__), "exec"), vars(narrowed))  # noqa: S102
    return narrowed


@torch.no_grad()
def randomize(model: torch.nn.Module) -> None:
    """Random weights of a size that keeps activations near 1; normalization weights near 1."""
    for name, parameter in model.named_parameters():
        if "norm" in name and "linear" not in name and name.endswith("weight"):
            parameter.copy_(1 + 0.1 * torch.randn(parameter.shape))
        elif parameter.ndim > 1:
            parameter.copy_(torch.randn(parameter.shape) / parameter[0].numel() ** 0.5)
        else:
            parameter.copy_(0.1 * torch.randn(parameter.shape))


def diffusers_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The weights of DiffSynth's `CogDiT` under diffusers' names: the inverse of the reference's own converter."""
    converter = model.state_dict_converter()
    blocks = {f"transformer_blocks.{block}." for block in range(LAYERS)}
    inner = ("norm1.linear", "norm1.norm", "norm2.linear", "norm2.norm", "attn1.norm_q", "attn1.norm_k", "attn1.to_q",
             "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ff.net.0.proj", "ff.net.2")  # fmt: skip
    outer = ("patch_embed.proj", "patch_embed.text_proj", "time_embedding.linear_1", "time_embedding.linear_2",
             "norm_final", "norm_out.linear", "norm_out.norm", "proj_out")  # fmt: skip
    names = [block + name for block in blocks for name in inner] + list(outer)
    names = [f"{name}.{parameter}" for name in names for parameter in ("weight", "bias")]
    renamed = converter.from_diffusers({name: torch.full((1, 1), float(index)) for index, name in enumerate(names)})
    state = model.state_dict()
    found = {names[int(marker.flatten()[0])]: state[ours] for ours, marker in renamed.items()}
    assert len(found) == len(state)
    found["patch_embed.proj.weight"] = found["patch_embed.proj.weight"].squeeze(2)
    return {name: tensor.clone() for name, tensor in found.items()}


def lora_tensors(
    weights: dict[str, torch.Tensor], modules: list[str], form: str = "{}.lora_{}.default.weight", seed: int = 1
) -> dict[str, torch.Tensor]:
    """A random LoRA for some modules.

    Args:
        weights: of the model, with the shapes that it is for.
        modules: names of linear layers.
        form: of a name, from the module and "A" or "B".
    """
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for module in modules:
        out, width = weights[f"{module}.weight"].shape
        found[form.format(module, "A")] = torch.randn(RANK, width, generator=generator) / width**0.5
        found[form.format(module, "B")] = torch.randn(out, RANK, generator=generator) / RANK**0.5
    return found


def with_lora(
    model: torch.nn.Module, lora: dict[str, torch.Tensor], form: str = "{}.lora_{}.default.weight"
) -> torch.nn.Module:
    """Add W + B A to every target of a model, in place."""
    with torch.no_grad():
        for name, module in model.named_modules():
            if form.format(name, "A") in lora:
                module.weight += lora[form.format(name, "B")] @ lora[form.format(name, "A")]
    return model


#: Linear layers of a CogDiT block that LoRAs change.
BLOCK_MODULES = (
    "attn1.to_q",
    "attn1.to_k",
    "attn1.to_v",
    "attn1.to_out",
    "ff.0",
    "ff.2",
    "norm1.linear",
    "norm2.linear",
)


def block_modules() -> list[str]:
    """All of them, in all blocks."""
    return [f"blocks.{block}.{module}" for block in range(LAYERS) for module in BLOCK_MODULES]


def save(tensors: dict[str, torch.Tensor], path: Path) -> Path:
    """Write a safetensors file."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path
