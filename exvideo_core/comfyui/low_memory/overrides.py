"""Whether a module still computes what ComfyUI's class computes, or someone has overridden it."""

from __future__ import annotations

import comfy.ops
import torch
from comfy.ldm.modules.attention import GEGLU, BasicTransformerBlock, CrossAttention, FeedForward
from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock

_LAYERS = comfy.ops.disable_weight_init
#: Layers that can be computed from their weights, and the methods that define how. Low-precision and quantized layers,
#: ComfyUI's own and those of other packs, are subclasses with other methods.
_PLAIN_LAYERS = (_LAYERS.Linear, _LAYERS.Conv2d, _LAYERS.Conv3d, _LAYERS.GroupNorm, _LAYERS.LayerNorm)
_METHODS = ("forward", "forward_comfy_cast_weights", "_conv_forward", "__call__", "_call_impl")
#: Blocks whose submodules can be called one by one.
_PLAIN_BLOCKS = (BasicTransformerBlock, CrossAttention, FeedForward, GEGLU, ResBlock)


def is_plain_layer(layer: torch.nn.Module) -> bool:
    """Whether a layer is one of ComfyUI's linear, convolution or norm layers, unmodified.

    Only then may it be computed from its weight and bias. Any other layer has to be called as a module: its `forward`
    may be replaced (bypass LoRAs), it may have hooks, a separate scale (0.3.64's scaled fp8), or weights that
    only its class can read (ComfyUI-GGUF).
    """
    if _has_hooks(layer) or getattr(layer, "scale_weight", None) is not None:
        return False
    plain = next((kind for kind in _PLAIN_LAYERS if isinstance(layer, kind)), None)
    return plain is not None and all(
        getattr(type(layer), method, None) is getattr(plain, method, None) for method in _METHODS
    )


def is_plain_block(module: torch.nn.Module) -> bool:
    """Whether a block runs ComfyUI's own `forward`, so that its submodules may be called one by one."""
    if _has_hooks(module):
        return False
    host = next((kind for kind in _PLAIN_BLOCKS if isinstance(module, kind)), None)
    # Compared by name: a pack may have replaced the class's method before this module was imported.
    forward = type(module).forward
    return host is not None and (forward.__module__, forward.__qualname__) == (
        host.__module__,
        f"{host.__qualname__}.forward",
    )


def _has_hooks(module: torch.nn.Module) -> bool:
    if module._forward_hooks or module._forward_pre_hooks:
        return True
    # Code that replaces a `forward` for a while may restore it by setting the class's own as an attribute.
    own = vars(module).get("forward")
    return own is not None and getattr(own, "__func__", None) is not type(module).forward
