"""The host's layers on chunks: computed from weights that are moved and cast once, or called where changed."""

from __future__ import annotations

import comfy.model_management
import comfy.ops
import torch
from torch.nn import functional

from .frame_maps import FrameMaps
from .overrides import computes_from_weights

Affine = tuple[torch.Tensor, torch.Tensor | None]


class Resident:
    """The weight and bias of modules as they compute: on the input's device, in its type, with LoRAs applied.

    Calling a module once a chunk would move a layer that waits in RAM once a chunk. All weights that a layer asks for
    stay until it is done: at most 0.4 GB in fp16, in SVD's widest block. Layers that somebody has changed are called as
    modules all the same: see `computes_from_weights`.

    Args:
        like: gives device and type.
    """

    def __init__(self, like: torch.Tensor | FrameMaps) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        self._like = like
        self._own: dict[int, bool] = {}
        self._found: dict[int, Affine] = {}

    def owns(self, module: torch.nn.Module) -> bool:
        """Whether a layer may be computed from its weights."""
        own = self._own.get(id(module))
        if own is None:
            own = self._own[id(module)] = computes_from_weights(module)
        return own

    def __call__(self, module: torch.nn.Module) -> Affine:
        """(weight, bias) of one of the host's linear, convolution or norm layers."""
        found = self._found.get(id(module))
        if found is None:
            found = self._found[id(module)] = self._cast(module)
        return found

    def linear(self, module: torch.nn.Module, x: torch.Tensor, shift: torch.Tensor | None = None) -> torch.Tensor:
        """A linear layer of x [..., C], and `shift` [C'] added to its result."""
        if not self.owns(module):
            out = module(x)
            return out if shift is None else out + shift
        weight, bias = self(module)
        if shift is not None:
            bias = shift if bias is None else bias + shift
        return functional.linear(x, weight, bias)

    def linear_into(self, out: torch.Tensor, module: torch.nn.Module, x: torch.Tensor) -> None:
        """A linear layer of x [..., C] whose result goes where it is wanted, out: contiguous [..., C']."""
        if not self.owns(module):
            out.copy_(module(x))
            return
        weight, bias = self(module)
        rows, result = x.reshape(-1, x.shape[-1]), out.view(-1, out.shape[-1])
        if bias is None:
            torch.mm(rows, weight.T, out=result)
        else:
            torch.addmm(bias, rows, weight.T, out=result)

    def layer_norm(self, module: torch.nn.LayerNorm, x: torch.Tensor) -> torch.Tensor:
        if not self.owns(module):
            return module(x)
        return functional.layer_norm(x, module.normalized_shape, *self(module), module.eps)

    def conv2d(self, module: torch.nn.Conv2d, x: torch.Tensor, stride: int = 1) -> torch.Tensor:
        """A 3x3 convolution of x [N, C, H, W] with its bias."""
        if not self.owns(module):
            return module(x)
        return functional.conv2d(x, *self(module), stride=stride, padding=1)

    def bias_of(self, module: torch.nn.Module) -> torch.Tensor | None:
        """The bias that `without_bias` leaves out."""
        return self(module)[1] if self.owns(module) else None

    def without_bias(self, module: torch.nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
        """A 3x3 convolution of x [N, C, H, W] to which `bias_of` is still to be added."""
        return functional.conv2d(x, self(module)[0], padding=1) if self.owns(module) else module(x)

    def _cast(self, module: torch.nn.Module) -> Affine:
        if not hasattr(module, "_v"):
            weight, bias = comfy.ops.cast_bias_weight(module, self._like)
            return weight, bias
        # The dynamic patcher (0.33 on CUDA) lends weights: in a buffer that the next layer overwrites, or in memory
        # that may be taken back once it is returned. So it is copied, which is little beside what is computed with it.
        weight, bias, lent = comfy.ops.cast_bias_weight(module, self._like, offloadable=True)
        weight, bias = weight.clone(), None if bias is None else bias.clone()
        comfy.ops.uncast_bias_weight(module, weight, bias, lent)
        return weight, bias
