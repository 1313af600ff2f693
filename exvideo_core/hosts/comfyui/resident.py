"""Weights of the host's layers, moved and cast once for all chunks of a call."""

from __future__ import annotations

import comfy.model_management
import comfy.ops
import torch

from ...frame_maps import FrameMaps

Affine = tuple[torch.Tensor, torch.Tensor | None]


class Resident:
    """The weight and bias of modules as they compute: on the input's device, in its type, with LoRAs applied.

    Calling a module once a chunk would move a layer that waits in RAM once a chunk. All weights that a layer asks for
    stay until it is done: at most 0.4 GB in fp16, in SVD's widest block.

    Args:
        like: gives device and type.
    """

    def __init__(self, like: torch.Tensor | FrameMaps) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        self._like = like
        self._found: dict[int, Affine] = {}

    def __call__(self, module: torch.nn.Module) -> Affine:
        """(weight, bias) of one of the host's linear, convolution or norm layers."""
        found = self._found.get(id(module))
        if found is None:
            found = self._found[id(module)] = self._cast(module)
        return found

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
