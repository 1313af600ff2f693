"""Narrow SVD models with random weights, on the host and on the reference."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass

import comfy.model_management
import comfy.model_patcher
import comfy.supported_models
import torch

import random_model
import reference
from exvideo_core.method.extension import Extension

#: Widths 64, 128, 256, 256: a fifth of SVD's, with its heads of 64 and its context of 1024.
DIVISOR = 5
CONTEXT = 1024
UNET = {
    **{key: value for key, value in random_model.UNET.items() if not key.startswith("num_head")},
    "model_channels": 64,
    "channel_mult": [1, 2, 4, 4],
    "context_dim": CONTEXT,
}
FRAMES = 128
_HAS_DYNAMIC_VRAM = importlib.util.find_spec("comfy.memory_management") is not None


@dataclass
class Pair:
    """The same base and extension, for the host and for the reference."""

    base: comfy.model_patcher.ModelPatcher
    extension: Extension
    checkpoint: dict[str, torch.Tensor]
    tensors: dict[str, torch.Tensor]

    def reference(self, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
        return reference.extended_unet(self.checkpoint, self.tensors, DIVISOR, dtype)


def patcher(dtype: torch.dtype, weights: dict[str, torch.Tensor]) -> comfy.model_patcher.ModelPatcher:
    """A host SVD that stores and computes in `dtype`, with `model.diffusion_model.*` weights."""
    config = comfy.supported_models.SVD_img2vid(dict(UNET))
    config.set_inference_dtype(dtype, None)
    cpu = torch.device("cpu")
    model = config.get_model({}, device=cpu)
    model.load_model_weights(dict(weights), "model.diffusion_model.")
    return comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)


@contextlib.contextmanager
def _layers_with_weights() -> Iterator[None]:
    """With dynamic VRAM loading, ComfyUI 0.33's linear layers have no weights until a file brings some."""
    management = importlib.import_module("comfy.memory_management") if _HAS_DYNAMIC_VRAM else None
    if management is None:
        yield
        return
    usual, management.aimdo_enabled = management.aimdo_enabled, False
    try:
        yield
    finally:
        management.aimdo_enabled = usual


def make_pair(dtype: torch.dtype = torch.float32, frames: int = FRAMES, seed: int = 0) -> Pair:
    generator = torch.Generator().manual_seed(seed)
    config = comfy.supported_models.SVD_img2vid(dict(UNET))
    config.set_inference_dtype(torch.float32, None)
    with _layers_with_weights():
        state = config.get_model({}, device="meta").diffusion_model.state_dict()
    shapes = {name: value.shape for name, value in state.items()}
    weights = {
        f"model.diffusion_model.{name}": random_model.random_weight(name, shape, generator)
        for name, shape in shapes.items()
    }
    widths = [64, 64, 128, 128, 256, 256, 256, 256, 256, 256, 128, 128, 128, 64, 64, 64]
    tensors = random_model.random_extension(widths, CONTEXT, frames, generator)
    weights = {name: value.to(dtype) for name, value in weights.items()}
    # Rounded to fp16 first, as published: on a GPU the host may compute weight patches in fp16.
    tensors = {name: value.half().to(dtype) for name, value in tensors.items()}
    return Pair(patcher(dtype, weights), Extension.from_tensors("random", tensors), weights, tensors)


def call_host(
    model: comfy.model_patcher.ModelPatcher,
    sample: torch.Tensor,
    timestep: float,
    context: torch.Tensor,
    ids: torch.Tensor,
) -> torch.Tensor:
    """One UNet call. sample [N, T, 8, H, W], context [N, 1, D], ids [N, 3] -> [N, T, 4, H, W]."""
    comfy.model_management.load_models_gpu([model])
    clips, frames = sample.shape[:2]
    embedded = torch.stack([model.model.embedder(row).flatten() for row in ids])
    with torch.no_grad():
        out = model.model.diffusion_model(
            sample.flatten(0, 1),
            torch.full((clips * frames,), timestep, device=sample.device),
            context=context.repeat_interleave(frames, 0),
            y=embedded.repeat_interleave(frames, 0).to(sample.dtype),
            num_video_frames=frames,
            # As the host's sampler hands them over.
            transformer_options={**model.model_options["transformer_options"], "wrappers": model.wrappers},
        )
    return out.unflatten(0, (clips, frames))


def relative_error(value: torch.Tensor, expected: torch.Tensor) -> float:
    return ((value.double() - expected.double()).norm() / expected.double().norm()).item()
