"""Makes the UNet of a clone compute in chunks, and offloads its skip connections."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import Downsample, Upsample, VideoResBlock
from comfy.patcher_extension import WrappersMP

from ..model import UNET, applied_extension, check_svd, original_module
from ..wrappers import set_wrapper
from .budget import limit_chunks
from .estimate import Estimate, MemorySettings, skips_are_patched
from .host_buffers import HostBuffers, host_buffers
from .res_blocks import ChunkedDownsample, ChunkedResBlock, ChunkedUpsample
from .skip_connections import SkipConnection

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

_KEY = "exvideo"
_CHUNKED = {VideoResBlock: ChunkedResBlock, Upsample: ChunkedUpsample, Downsample: ChunkedDownsample}


def with_memory_settings(model: ModelPatcher, settings: MemorySettings) -> ModelPatcher:
    """A clone of an extended model with other memory settings.

    Raises:
        ValueError: the model is not an SVD model, or has no extension.
    """
    check_svd(model)
    if applied_extension(model) is None:
        raise ValueError("This model has no ExVideo extension. Connect the model from ExVideo Apply.")
    patched = model.clone()
    set_memory_settings(patched, settings)
    return patched


def set_memory_settings(patched: ModelPatcher, settings: MemorySettings) -> None:
    """Set or replace the memory settings of a clone with chunked layers."""
    unet = _ChunkedUNet(
        settings,
        channels=patched.model.diffusion_model.model_channels,
        itemsize=(patched.model.manual_cast_dtype or patched.model.get_dtype()).itemsize,
    )
    for kind, wrapper in (
        (WrappersMP.DIFFUSION_MODEL, unet.diffusion_model),
        (WrappersMP.PREPARE_SAMPLING, unet.estimate.prepare_sampling),
        (WrappersMP.CALC_COND_BATCH, unet.estimate.calc_cond_batch),
        (WrappersMP.OUTER_SAMPLE, unet.outer_sample),
    ):
        set_wrapper(patched, kind, _KEY, wrapper, first=False)


def chunked_layers(patcher: ModelPatcher, unpatched: bool = False) -> dict[str, torch.nn.Module]:
    """Layers that compute in chunks, by the path of the layers that they replace.

    Layers that another node has patched are left alone, unless `unpatched` says that the patches are for another model.
    """
    found: dict[str, torch.nn.Module] = {}
    for name, module in patcher.model.diffusion_model.named_modules():
        if not isinstance(module, tuple(_CHUNKED)):
            continue
        path = f"{UNET}{name}"
        base = original_module(patcher, path) if unpatched else patcher.get_model_object(path)
        chunked = _CHUNKED.get(type(base))
        if chunked is not None:
            found[path] = chunked(base)
    return found


class _ChunkedUNet:
    """The wrappers of a clone, and the buffers that a sampling offloads its skip connections to."""

    def __init__(self, settings: MemorySettings, channels: int, itemsize: int) -> None:
        self._settings = settings
        self._buffers: dict[torch.device, HostBuffers] = {}
        self.estimate = Estimate(settings, channels, itemsize)

    def diffusion_model(
        self,
        executor: Any,  # noqa: ANN401 - ComfyUI's
        x: torch.Tensor,
        timesteps: torch.Tensor,
        context: torch.Tensor,
        y: torch.Tensor,
        control: dict[str, Any] | None,
        transformer_options: dict[str, Any],
        **rest: Any,  # noqa: ANN401 - passed on
    ) -> torch.Tensor:
        """DIFFUSION_MODEL wrapper: a call of the UNet within the chunk limit, with lazy skip connections."""
        options = transformer_options
        only_ours = control is None and not torch.is_grad_enabled() and _only_we_read_skips(executor.class_obj, options)
        if only_ours:
            buffers = self._begin_call(x.device) if self._settings.offload_skips else None
            options = {**options, "patches": _with_lazy_skips(options.get("patches", {}), buffers)}
        with limit_chunks(self._settings.chunk_bytes(x.device)):
            return executor(x, timesteps, context, y, control, options, **rest)

    def outer_sample(self, executor: Any, noise: torch.Tensor, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """OUTER_SAMPLE wrapper: refuses empty latents, and frees the buffers when the sampling ends."""
        if 0 in noise.shape:
            raise ValueError(
                f"The latent is empty: its shape is {list(noise.shape)} (frames, channels, height, width). Give the "
                "sampler a latent of at least 1 frame, such as that of ExVideo Conditioning."
            )
        try:
            return executor(noise, *args, **kwargs)
        finally:
            self._buffers.clear()
            self.estimate.reset()

    def _begin_call(self, device: torch.device) -> HostBuffers:
        if device not in self._buffers:
            self._buffers[device] = host_buffers(device)
        buffers = self._buffers[device]
        buffers.begin()
        return buffers


def _only_we_read_skips(unet: torch.nn.Module, options: dict[str, Any]) -> bool:
    """Whether nothing but our own layers sees the skip connections and what they are concatenated to."""
    return not skips_are_patched(options) and all(isinstance(block[0], ChunkedResBlock) for block in unet.output_blocks)


def _with_lazy_skips(patches: dict[str, Any], buffers: HostBuffers | None) -> dict[str, Any]:
    """Patches by which ComfyUI's UNet keeps `SkipConnection`s, in between the user's own patches."""

    def keep(h: torch.Tensor, options: dict[str, Any]) -> SkipConnection:  # noqa: ARG001 - ComfyUI's signature
        return SkipConnection(h, buffers)

    def take(h: SkipConnection, options: dict[str, Any]) -> torch.Tensor:  # noqa: ARG001 - ComfyUI's signature
        return h.take()

    kept = [*patches.get("input_block_patch", []), keep]
    return {
        **patches,
        "input_block_patch": kept,
        "input_block_patch_after_skip": [take, *patches.get("input_block_patch_after_skip", [])],
    }
