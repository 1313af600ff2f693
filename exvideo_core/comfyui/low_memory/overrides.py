"""Whether a module computes what the host's class computes, or somebody has changed it."""

from __future__ import annotations

import comfy.ops
import torch
from comfy.ldm.modules.attention import GEGLU, BasicTransformerBlock, CrossAttention, FeedForward
from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock

_LAYERS = comfy.ops.disable_weight_init
#: Layers that may be computed from their weights, and the methods that say how they compute. Low-precision and
#: quantised layers, the host's own and those of other packs, are subclasses with other methods.
_FROM_WEIGHTS = (_LAYERS.Linear, _LAYERS.Conv2d, _LAYERS.Conv3d, _LAYERS.GroupNorm, _LAYERS.LayerNorm)
_METHODS = ("forward", "forward_comfy_cast_weights", "_conv_forward", "__call__", "_call_impl")
#: Modules whose parts may be called one by one.
_OF_PARTS = (BasicTransformerBlock, CrossAttention, FeedForward, GEGLU, ResBlock)


def computes_from_weights(layer: torch.nn.Module) -> bool:
    """Whether a layer is a linear, convolution or norm layer of the host that nobody has changed.

    Only then may it be computed from its weight and bias. Any other has to be called as a module: its `forward` may be
    replaced (as by bypass LoRAs), it may have hooks, scales beside its weights (0.3.64's scaled fp8), or weights that
    only its class can read (ComfyUI-GGUF).
    """
    if _has_hooks(layer) or getattr(layer, "scale_weight", None) is not None:
        return False
    host = next((kind for kind in _FROM_WEIGHTS if isinstance(layer, kind)), None)
    return host is not None and all(
        getattr(type(layer), method, None) is getattr(host, method, None) for method in _METHODS
    )


def is_sum_of_its_parts(module: torch.nn.Module) -> bool:
    """Whether a block of the host computes as the host's source says, so that its parts may be called one by one."""
    if _has_hooks(module):
        return False
    host = next((kind for kind in _OF_PARTS if isinstance(module, kind)), None)
    # By name: a pack may have replaced the class's method before this module was imported.
    forward = type(module).forward
    return host is not None and (forward.__module__, forward.__qualname__) == (
        host.__module__,
        f"{host.__qualname__}.forward",
    )


def _has_hooks(module: torch.nn.Module) -> bool:
    if module._forward_hooks or module._forward_pre_hooks:
        return True
    # Who replaces a `forward` for a while may put the class's own back, as an attribute.
    own = vars(module).get("forward")
    return own is not None and getattr(own, "__func__", None) is not type(module).forward
