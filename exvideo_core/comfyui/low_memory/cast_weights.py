"""Weights on the input's device and in its dtype, moved and cast once for all chunks of a layer."""

from __future__ import annotations

import comfy.model_management
import comfy.ops
import torch
from torch.nn import functional

from .frame_maps import FrameMaps
from .overrides import is_plain_layer

Affine = tuple[torch.Tensor, torch.Tensor | None]


class CastWeights:
    """Computes ComfyUI's layers on chunks, from weights that are cast once, with LoRAs applied.

    Calling a module once per chunk would move a layer that is offloaded to RAM once per chunk. All weights that a block
    asks for stay on the device until the block is done: at most 0.4 GB in fp16, in SVD's widest block. A layer that is
    modified in any way is called as a module instead: see `is_plain_layer`.

    Args:
        like: gives the device and the dtype.
    """

    def __init__(self, like: torch.Tensor | FrameMaps) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        self._like = like
        self._plain: dict[int, bool] = {}
        self._cast: dict[int, Affine] = {}

    def is_plain(self, module: torch.nn.Module) -> bool:
        """Whether a layer may be computed from its weights."""
        plain = self._plain.get(id(module))
        if plain is None:
            plain = self._plain[id(module)] = is_plain_layer(module)
        return plain

    def __call__(self, module: torch.nn.Module) -> Affine:
        """(weight, bias) of a plain linear, convolution or norm layer."""
        cast = self._cast.get(id(module))
        if cast is None:
            cast = self._cast[id(module)] = _cast(module, self._like)
        return cast

    def linear(self, module: torch.nn.Module, x: torch.Tensor, shift: torch.Tensor | None = None) -> torch.Tensor:
        """A linear layer: x [..., C] -> [..., C'], plus `shift` [C']."""
        if not self.is_plain(module):
            out = module(x)
            return out if shift is None else out + shift
        weight, bias = self(module)
        if shift is not None:
            bias = shift if bias is None else bias + shift
        return functional.linear(x, weight, bias)

    def linear_into(self, out: torch.Tensor, module: torch.nn.Module, x: torch.Tensor) -> None:
        """A linear layer of x [..., C], written to `out`, contiguous [..., C']."""
        if not self.is_plain(module):
            out.copy_(module(x))
            return
        weight, bias = self(module)
        rows, result = x.reshape(-1, x.shape[-1]), out.view(-1, out.shape[-1])
        if bias is None:
            torch.mm(rows, weight.T, out=result)
        else:
            torch.addmm(bias, rows, weight.T, out=result)

    def layer_norm(self, module: torch.nn.LayerNorm, x: torch.Tensor) -> torch.Tensor:
        """A layer norm of x [..., C]."""
        if not self.is_plain(module):
            return module(x)
        return functional.layer_norm(x, module.normalized_shape, *self(module), module.eps)

    def conv2d(self, module: torch.nn.Conv2d, x: torch.Tensor, stride: int = 1) -> torch.Tensor:
        """A 3x3 convolution of x [N, C, H, W], with its bias."""
        if not self.is_plain(module):
            return module(x)
        return functional.conv2d(x, *self(module), stride=stride, padding=1)

    def conv2d_without_bias(self, module: torch.nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
        """A 3x3 convolution of x [N, C, H, W]; the caller adds `bias_of(module)`."""
        return functional.conv2d(x, self(module)[0], padding=1) if self.is_plain(module) else module(x)

    def bias_of(self, module: torch.nn.Module) -> torch.Tensor | None:
        """The bias that `conv2d_without_bias` leaves out."""
        return self(module)[1] if self.is_plain(module) else None


def _cast(module: torch.nn.Module, like: torch.Tensor | FrameMaps) -> Affine:
    if not hasattr(module, "_v"):
        weight, bias = comfy.ops.cast_bias_weight(module, like)
        return weight, bias
    # The dynamic patcher (0.33 on CUDA) lends weights: in a buffer that the next layer overwrites, or in memory that it
    # may reclaim once they are returned. Hence the copy, which costs little next to what is computed with it.
    weight, bias, lent = comfy.ops.cast_bias_weight(module, like, offloadable=True)
    weight, bias = weight.clone(), None if bias is None else bias.clone()
    comfy.ops.uncast_bias_weight(module, weight, bias, lent)
    return weight, bias
