"""A straightforward port of the extension to ComfyUI, without any optimization of memory or speed."""

from __future__ import annotations

from typing import Any

import comfy.model_patcher
import torch
from comfy.ldm.modules.attention import SpatialVideoTransformer

from exvideo_core.comfyui.model import find_transformers, share_submodules
from exvideo_core.method.convolution import positional_convolution
from exvideo_core.method.extension import BlockWeights, Extension


class PlainTransformer(SpatialVideoTransformer):
    """ComfyUI's transformer with positions and the 3-D convolution before its temporal block."""

    def __init__(self, base: SpatialVideoTransformer, weights: BlockWeights) -> None:
        share_submodules(self, base)
        like = base.norm.weight
        self.table = torch.nn.Parameter(weights.positions.to(like), requires_grad=False)
        channels = weights.conv_bias.shape[0]
        self.conv = torch.nn.Conv3d(channels, channels, 3, device="meta")
        self.conv.weight = torch.nn.Parameter(weights.conv_weight.to(like), requires_grad=False)
        self.conv.bias = torch.nn.Parameter(weights.conv_bias.to(like), requires_grad=False)

    def forward(
        self,
        x: torch.Tensor,
        context: torch.Tensor | None = None,
        time_context: torch.Tensor | None = None,
        timesteps: int | None = None,
        image_only_indicator: torch.Tensor | None = None,
        transformer_options: dict[str, Any] | None = None,
    ) -> torch.Tensor:
        assert context is not None and timesteps is not None
        height, width = x.shape[-2:]
        tokens = self.proj_in(self.norm(x).flatten(2).transpose(1, 2).contiguous())
        tokens = self.transformer_blocks[0](tokens, context=context, transformer_options=transformer_options)
        pixel_context = context[::timesteps].repeat_interleave(height * width, dim=0)
        shift = self.time_pos_embed(self.table[:timesteps])
        temporal = positional_convolution(tokens, shift, self.conv, height, width)
        temporal = self.time_stack[0](temporal, context=pixel_context, transformer_options=transformer_options)
        temporal = temporal.unflatten(0, (-1, height * width)).transpose(1, 2).flatten(0, 1)
        mixed = self.time_mixer(x_spatial=tokens, x_temporal=temporal, image_only_indicator=image_only_indicator)
        return x + self.proj_out(mixed).transpose(1, 2).unflatten(2, (height, width))


def apply(patcher: comfy.model_patcher.ModelPatcher, extension: Extension) -> comfy.model_patcher.ModelPatcher:
    """A clone with the extension applied."""
    patched = patcher.clone()
    shared: dict[str, tuple[torch.Tensor]] = {}
    for (path, base), weights in zip(find_transformers(patcher).items(), extension.blocks, strict=True):
        patched.add_object_patch(path, PlainTransformer(base, weights))
        shared |= {f"{path}.{name}": (tensor,) for name, tensor in weights.shared.items()}
    patched.add_patches(shared, strength_patch=1.0, strength_model=0.0)
    return patched
