"""What a call of an extended UNet needs, what the host is told of it, and how the call is cut to fit."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import comfy.model_management
import comfy.patcher_extension
import comfy.utils
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import Downsample, Upsample, VideoResBlock

from ... import chunks
from ...skips import Skip
from .resblock import BoundedDownsample, BoundedResBlock, BoundedUpsample
from .wrapping import wrap

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

_KEY = "exvideo"
_BOUNDED = {VideoResBlock: BoundedResBlock, Upsample: BoundedUpsample, Downsample: BoundedDownsample}
#: Full-size maps of the UNet's first width that a call holds at its widest place, the first block of the last level:
#: its input of twice the width, its output, and, unless they wait in host memory, three skip tensors.
_MAPS, _SKIP_MAPS = 3, 3
#: Chunk-sized intermediates that are alive at once.
_CHUNKS = 4
#: Latent pixels (frames x height x width) up to which a GPU is taken not to be filled by one condition: 32 frames of
#: 512x512, at whose lowest level 2,048 tokens are left.
_SHARED_PIXELS = 2**17


@dataclass(frozen=True)
class MemorySettings:
    """How a model's calls are cut.

    Attributes:
        chunk_megabytes: size of a chunk's widest intermediate; 0 follows the memory that is free.
        offload_skips: keep skip tensors in host memory.
    """

    chunk_megabytes: int = 0
    offload_skips: bool = False

    def budget(self, device: torch.device) -> chunks.Budget:
        """Of a call that is about to begin."""
        if self.chunk_megabytes:
            size = self.chunk_megabytes * chunks.MEGABYTE
        elif device.type == "cpu":
            size = chunks.DEFAULT.chunk_bytes  # however much memory is free
        else:
            free = int(comfy.model_management.get_free_memory(device))
            size = min(max(free // 16, 32 * chunks.MEGABYTE), 512 * chunks.MEGABYTE)
        return chunks.Budget(size, self.offload_skips)

    def needed(self, shape: Sequence[int], channels: int, itemsize: int) -> float:
        """Bytes that one condition's call needs beside the weights.

        Args:
            shape: of the latents [T, C, H, W].
            channels: of the UNet's first level.
        """
        area = shape[0] * math.prod(shape[2:]) * channels * itemsize
        maps = _MAPS + (0 if self.offload_skips else _SKIP_MAPS)
        chunk = (self.chunk_megabytes or 64) * chunks.MEGABYTE
        return area * maps * 1.1 + chunk * _CHUNKS


def original(patcher: ModelPatcher, path: str) -> torch.nn.Module:
    """The model's own module, whatever is patched over it, now or once loaded."""
    backup = patcher.object_patches_backup.get(path)
    return comfy.utils.get_attr(patcher.model, path) if backup is None else backup


def bounded_layers(patcher: ModelPatcher, unpatched: bool = False) -> dict[str, torch.nn.Module]:
    """Layers that work in chunks, by the path of those that they stand for.

    Layers that somebody else has patched are left alone, unless `unpatched` says that the patches are not for this
    model.
    """
    found: dict[str, torch.nn.Module] = {}
    for name, module in patcher.model.diffusion_model.named_modules():
        if not isinstance(module, tuple(_BOUNDED)):
            continue
        path = f"diffusion_model.{name}"
        base = original(patcher, path) if unpatched else patcher.get_model_object(path)
        bounded = _BOUNDED.get(type(base))
        if bounded is not None:
            found[path] = bounded(base)
    return found


def configure(patched: ModelPatcher, settings: MemorySettings) -> None:
    """Set or replace the settings of a bounded clone."""
    estimate = _Estimate(
        settings,
        channels=patched.model.diffusion_model.model_channels,
        itemsize=(patched.model.manual_cast_dtype or patched.model.get_dtype()).itemsize,
        shared_pixels=0 if comfy.model_management.is_device_cpu(patched.load_device) else _SHARED_PIXELS,
    )
    patched.add_object_patch("memory_required", estimate.of_a_batch)
    wrappers = comfy.patcher_extension.WrappersMP
    for kind, wrapper in (
        (wrappers.DIFFUSION_MODEL, _call(settings)),
        (wrappers.PREPARE_SAMPLING, estimate.prepare),
    ):
        wrap(patched, kind, _KEY, wrapper, first=False)


@dataclass(frozen=True)
class _Estimate:
    """Tells the host what calls need. Holds no patcher: it would keep the model alive that keeps it.

    Attributes:
        channels, itemsize: of the UNet's first level.
        shared_pixels: latent pixels (frames x height x width) of one condition, up to which two share a batch. On a
            CPU a larger batch is never faster, on a GPU only for clips too small to fill it.
    """

    settings: MemorySettings
    channels: int
    itemsize: int
    shared_pixels: int

    def of_a_batch(self, input_shape: Sequence[int], cond_shapes: Any = None) -> float:  # noqa: ARG002, ANN401
        """Stands for `BaseModel.memory_required` while sampling: conditions share a batch if this much is free.

        The shape is that of all conditions that would share, so a single one is refused here as well; the host then
        runs it alone all the same.
        """
        if math.prod(input_shape[2:]) * input_shape[0] > 2 * self.shared_pixels:
            return math.inf
        return self.settings.needed(input_shape, self.channels, self.itemsize)

    def prepare(
        self,
        executor: Any,  # noqa: ANN401 - the host's
        model: ModelPatcher,
        noise_shape: Sequence[int],
        *rest: Any,  # noqa: ANN401
        **named: Any,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        """Loading makes room by `BaseModel.memory_required`, before a patch of it can be in place."""
        real = model.model
        usual = real.memory_required
        alone = math.prod(noise_shape[2:]) * noise_shape[0] > self.shared_pixels

        def required(input_shape: Sequence[int], cond_shapes: Any = None) -> float:  # noqa: ARG001, ANN401
            return self.settings.needed(noise_shape if alone else input_shape, self.channels, self.itemsize)

        real.memory_required = required
        try:
            return executor(model, noise_shape, *rest, **named)
        finally:
            if real.memory_required is required:
                real.memory_required = usual
            if model.object_patches_backup.get("memory_required") is required:
                model.object_patches_backup["memory_required"] = usual


def _call(settings: MemorySettings) -> Callable[..., Any]:
    """Runs a call of the UNet within a budget, its skip tensors as `Skip`s."""

    def wrapper(
        executor: Any,  # noqa: ANN401 - the host's
        x: torch.Tensor,
        timesteps: torch.Tensor,
        context: torch.Tensor,
        y: torch.Tensor,
        control: dict[str, Any] | None,
        transformer_options: dict[str, Any],
        **rest: Any,  # noqa: ANN401 - passed on
    ) -> torch.Tensor:
        budget = settings.budget(x.device)
        options = transformer_options
        if control is None and _reads_no_skips(executor.class_obj, options):
            options = {**options, "patches": _with_skips(options.get("patches", {}), budget.offload_skips)}
        with chunks.use(budget):
            return executor(x, timesteps, context, y, control, options, **rest)

    return wrapper


def _reads_no_skips(unet: torch.nn.Module, options: dict[str, Any]) -> bool:
    """Whether nothing but our own layers gets to see skip tensors, and what they are joined to."""
    patches = options.get("patches", {})
    foreign = patches.get("output_block_patch") or patches.get("forward_timestep_embed_patch")
    return not foreign and all(isinstance(block[0], BoundedResBlock) for block in unet.output_blocks)


def _with_skips(patches: dict[str, Any], offload: bool) -> dict[str, Any]:
    """Patches by which the host keeps `Skip`s, in between a user's own."""

    def keep(h: torch.Tensor, options: dict[str, Any]) -> Skip:  # noqa: ARG001 - the host's signature
        return Skip(h, offload)

    def go_on(h: Skip, options: dict[str, Any]) -> torch.Tensor:  # noqa: ARG001 - the host's signature
        return h.take()

    kept = [*patches.get("input_block_patch", []), keep]
    return {
        **patches,
        "input_block_patch": kept,
        "input_block_patch_after_skip": [go_on, *patches.get("input_block_patch_after_skip", [])],
    }
