"""The UNets to compare: ours in ComfyUI and the reference's, with the same random weights."""

from __future__ import annotations

import gc
import os
import re
import sys
import types
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

PACK = Path(__file__).resolve().parents[1]
HOST = Path(os.environ["EXVIDEO_HOST"])
sys.path[:0] = [str(HOST), str(PACK / "tests")]

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing(False)
import comfy.cli_args  # noqa: E402

if not torch.cuda.is_available():
    comfy.cli_args.args.cpu = True
    # ComfyUI's default on GPUs, and the reference's everywhere.
    comfy.cli_args.args.use_pytorch_cross_attention = True

import comfy.model_management  # noqa: E402
import comfy.model_patcher  # noqa: E402
import comfy.supported_models  # noqa: E402
import comfy.utils  # noqa: E402

import random_model  # noqa: E402
import reference  # noqa: E402
from exvideo_core.method import tensor_names  # noqa: E402
from exvideo_core.method.extension import Extension  # noqa: E402

from . import plain_port  # noqa: E402

CONTEXT = 1024
#: Channel multiples of the levels: SVD's, and equal widths, with which the first level's share of the work at a small
#: size is as high as SVD's at a large size.
MULTIPLES = {"full": [1, 2, 4, 4], "narrow": [1, 1, 1, 1]}


def _config(kind: str) -> comfy.supported_models.SVD_img2vid:
    config = {key: value for key, value in random_model.UNET.items() if not key.startswith("num_head")}
    config |= {"model_channels": 320, "channel_mult": MULTIPLES[kind], "context_dim": CONTEXT}
    return comfy.supported_models.SVD_img2vid(config)


def reference_module(kind: str) -> types.ModuleType:
    """The reference's UNet module. If `kind` is "narrow", all levels are patched to 320 channels."""
    module = reference.module("models.svd_unet")
    if kind == "full":
        return module
    source = Path(module.__file__ or "").read_text(encoding="utf-8")
    start = source.index("class SVDUNet(")
    end = source.index("    def build_mask", start)
    body = re.sub(r"(PopBlock\(\),\s*ResnetBlock\()\d+, \d+", r"\g<1>JOINED, 320", source[start:end])
    body = re.sub(r"(ResnetBlock\()\d+, \d+", r"\g<1>320, 320", body).replace("JOINED", "640")
    body = re.sub(r"(AttentionBlock\()\d+, 64, \d+", r"\g<1>5, 64, 320", body)
    body = re.sub(r"((?:PopMixBlock|DownSampler|UpSampler)\()\d+", r"\g<1>320", body)
    narrow = types.ModuleType("svd_unet_of_one_width")
    narrow.__package__ = module.__package__
    exec(compile(source[:start] + body + source[end:], "svd_unet", "exec"), narrow.__dict__)  # noqa: S102
    return narrow


@dataclass(frozen=True)
class Weights:
    """Weights of a base and an extension, with their published names."""

    kind: str
    base: dict[str, torch.Tensor]
    extension: dict[str, torch.Tensor]


def shapes(kind: str, frames: int) -> tuple[dict[str, torch.Size], dict[str, tuple[int, ...]]]:
    """Shapes of the tensors of a base and an extension."""
    config = _config(kind)
    config.set_inference_dtype(torch.float32, None)
    state = config.get_model({}, device="meta").diffusion_model.state_dict()
    base = {f"model.diffusion_model.{name}": value.shape for name, value in state.items()}
    widths = [base[f"model.diffusion_model.{name}.norm.weight"][0] for name in tensor_names.SVD_TRANSFORMERS]
    return base, tensor_names.extension_shapes(widths, CONTEXT, frames)


def random_weights(
    kind: str, frames: int, dtype: torch.dtype, seed: int = 0, device: torch.device | None = None
) -> Weights:
    """Random weights in RAM, generated on `device`: a GPU takes a second, a CPU a minute."""
    generator = torch.Generator().manual_seed(seed) if device is None else None
    prefix = len("model.diffusion_model.")
    found = shapes(kind, frames)[0]
    with nullcontext() if device is None else device:
        base = {
            n: random_model.random_weight(n[prefix:], shape, generator).to("cpu", dtype) for n, shape in found.items()
        }
        widths = [base[f"model.diffusion_model.{name}.norm.weight"].shape[0] for name in tensor_names.SVD_TRANSFORMERS]
        extension = random_model.random_extension(widths, CONTEXT, frames, generator)
    return Weights(kind, base, {name: value.to("cpu", dtype) for name, value in extension.items()})


def ours(
    weights: Weights, plain: bool = False, chunk_megabytes: int = 0, offload_skips: bool = False, fake: bool = False
) -> comfy.model_patcher.ModelPatcher:
    """ComfyUI's model with the extension applied and loaded.

    Args:
        weights: weights of base and extension.
        plain: use the plain port instead of this pack.
        chunk_megabytes, offload_skips: settings of ExVideo Memory.
        fake: weights have no data and cannot be moved, so that only the layers are replaced.
    """
    from exvideo_core.comfyui.apply.patch import apply_extension
    from exvideo_core.comfyui.low_memory.chunked_unet import with_memory_settings
    from exvideo_core.comfyui.low_memory.estimate import MemorySettings

    dtype = next(iter(weights.base.values())).dtype
    config = _config(weights.kind)
    config.set_inference_dtype(dtype, None)
    device = comfy.model_management.get_torch_device()
    model = config.get_model({}, device=device if fake else torch.device("cpu"))
    model.load_model_weights(dict(weights.base), "model.diffusion_model.")
    patcher = comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=torch.device("cpu"))
    extension = Extension.from_tensors("random", weights.extension)
    if plain:
        patched = plain_port.apply(patcher, extension)
    else:
        settings = MemorySettings(chunk_megabytes, offload_skips)
        patched = with_memory_settings(apply_extension(patcher, extension), settings)
    if fake:
        for path, layer in patched.object_patches.items():
            comfy.utils.set_attr(patched.model, path, layer)
    else:
        comfy.model_management.load_models_gpu([patched])
    return patched


def theirs(weights: Weights) -> torch.nn.Module:
    """The reference's UNet with the extension."""
    module = reference_module(weights.kind)
    frames = weights.extension["blocks.7.positional_embedding.embeddings"].shape[0]
    device = comfy.model_management.get_torch_device()
    default = torch.get_default_dtype()
    torch.set_default_dtype(next(iter(weights.base.values())).dtype)  # fake weights cannot be converted later
    try:
        with torch.device(device):
            unet = module.SVDUNet(add_positional_conv=frames).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(default)
    state = module.SVDUNet.state_dict_converter().from_civitai(dict(weights.base))
    unet.load_state_dict({**state, **weights.extension})
    for module in unet.modules():  # the reference always creates mixing factors on the CPU
        for name, value in module.named_parameters(recurse=False):
            if value.device != device:
                setattr(module, name, torch.nn.Parameter(value.to(device), requires_grad=False))
    return unet


@dataclass(frozen=True)
class Inputs:
    """Inputs of one call: sample [T, 8, H, W], context [1, 1, D], micro-conditioning [1, 3]."""

    sample: torch.Tensor
    context: torch.Tensor
    ids: torch.Tensor

    @classmethod
    def random(cls, frames: int, size: int, dtype: torch.dtype) -> Inputs:
        generator = torch.Generator().manual_seed(1)
        device = comfy.model_management.get_torch_device()
        sample = torch.randn(frames, 8, size, size, generator=generator)
        context = torch.randn(1, 1, CONTEXT, generator=generator)
        ids = torch.tensor([[29.0, 127.0, 0.02]])
        return cls(sample.to(device, dtype), context.to(device, dtype), ids.to(device))


@torch.no_grad()
def call_ours(
    patched: comfy.model_patcher.ModelPatcher,
    inputs: Inputs,
    embedded: torch.Tensor | None = None,
    conditions: int = 1,
) -> Any:  # noqa: ANN401
    """Call ComfyUI's UNet with the wrappers that its samplers run.

    Args:
        patched: a loaded model.
        inputs: inputs of the call.
        embedded: embedded micro-conditioning (default: computed from the inputs).
        conditions: number of conditions in the batch.
    """
    frames = len(inputs.sample)
    if embedded is None:
        embedded = torch.cat([patched.model.embedder(value[None]) for value in inputs.ids[0]], dim=1)
    options = {
        **patched.model_options.get("transformer_options", {}),
        "wrappers": patched.wrappers,
        "cond_or_uncond": [1, 0] if conditions == 2 else [0] * conditions,
        "original_shape": list(inputs.sample.shape),
    }
    count = conditions * frames
    return patched.model.diffusion_model(
        inputs.sample.repeat(conditions, 1, 1, 1),
        torch.full((count,), 0.7, device=inputs.sample.device),
        context=inputs.context.expand(count, -1, -1),
        y=embedded.to(inputs.sample).expand(count, -1),
        num_video_frames=frames,
        transformer_options=options,
    )


@torch.no_grad()
def call_theirs(unet: torch.nn.Module, inputs: Inputs) -> torch.Tensor:
    """Call the reference's UNet."""
    return unet(inputs.sample, 0.7, inputs.context[0], inputs.ids)


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def free() -> None:
    """Free the memory of unused models."""
    comfy.model_management.unload_all_models()
    gc.collect()
    comfy.model_management.soft_empty_cache()
