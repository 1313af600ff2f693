"""What a call of an extended UNet needs, what the host is told of it, and how the call is cut to fit."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import comfy.model_base
import comfy.model_management
import comfy.patcher_extension
import comfy.utils
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import Downsample, Upsample, VideoResBlock

from ..wrappers import wrap
from . import budget as chunks
from .attention_patches import Reach, ask_for_conditions, reach_of
from .host_buffers import buffers_for
from .res_blocks import BoundedDownsample, BoundedResBlock, BoundedUpsample
from .skip_connections import HostBuffers, Skip

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

_KEY = "exvideo"
_BOUNDED = {VideoResBlock: BoundedResBlock, Upsample: BoundedUpsample, Downsample: BoundedDownsample}
#: Full-size maps of the UNet's first width that a call holds at its widest place, the first block of the last level:
#: its input of twice the width, its output, and, unless they wait in host memory, three skip tensors.
_MAPS, _SKIP_MAPS = 3, 3
#: What more of them a call holds where a transformer block is not computed in chunks (the host's feed-forward holds up
#: to 17 times its input, beside the input, its norm and the result), where a patch changes skip tensors (FreeU_V2's
#: Fourier transforms), and where ControlNets add to them (each is then joined at once, to twice the first width).
_WHOLE_BLOCK_MAPS, _PATCHED_SKIP_MAPS, _CONTROLLED_SKIP_MAPS = 20, 8, 2
#: Chunk-sized intermediates that are alive at once.
_CHUNKS = 4
#: Sizes of chunks in MiB, up to cards of so many GiB. Large chunks are fewer kernels to launch, which fast cards wait
#: for. They follow from what the card is, not from what is free: kernels round differently for other sizes, and the
#: same seed has to give the same clip.
_CHUNKS_OF_CARDS = ((10, 128), (20, 256), (math.inf, 512))
#: Latent pixels (frames x height x width) up to which a GPU is taken not to be filled by one condition: 32 frames of
#: 512x512, at whose lowest level 2,048 tokens are left.
_SHARED_PIXELS = 2**17


@dataclass(frozen=True)
class MemorySettings:
    """How a model's calls are cut.

    Attributes:
        chunk_megabytes: size of a chunk's widest intermediate; 0 follows the size of the card.
        offload_skips: keep skip tensors in host memory.
    """

    chunk_megabytes: int = 0
    offload_skips: bool = False

    def chunk_bytes(self, device: torch.device) -> int:
        """The size of a chunk on a device."""
        if self.chunk_megabytes:
            return self.chunk_megabytes * chunks.MEGABYTE
        if device.type == "cpu":
            return chunks.DEFAULT.chunk_bytes
        total = comfy.model_management.get_total_memory(device) / 2**30
        return next(size for most, size in _CHUNKS_OF_CARDS if total <= most) * chunks.MEGABYTE

    def needed(
        self,
        shape: Sequence[int],
        channels: int,
        itemsize: int,
        device: torch.device,
        skips_stay: bool = False,
        more_maps: int = 0,
    ) -> float:
        """Bytes that a call needs on a device beside the weights.

        Args:
            shape: of the latents [N, C, H, W], N being the frames of all conditions in the call.
            channels: of the UNet's first level.
            itemsize: bytes of a number.
            skips_stay: skip tensors are on the device, whatever the settings say: somebody else reads them.
            more_maps: what other nodes take, in full-size maps of the first width.
        """
        area = shape[0] * math.prod(shape[2:]) * channels * itemsize
        maps = _MAPS + more_maps + (0 if self.offload_skips and not skips_stay else _SKIP_MAPS)
        return area * maps * 1.1 + self.chunk_bytes(device) * _CHUNKS


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
    sampling = _Sampling()
    estimate = _Estimate(
        settings,
        sampling,
        channels=patched.model.diffusion_model.model_channels,
        itemsize=(patched.model.manual_cast_dtype or patched.model.get_dtype()).itemsize,
    )
    wrappers = comfy.patcher_extension.WrappersMP
    for kind, wrapper in (
        (wrappers.DIFFUSION_MODEL, _call(settings, sampling)),
        (wrappers.PREPARE_SAMPLING, estimate.while_preparing),
        (wrappers.CALC_COND_BATCH, estimate.while_batching),
        (wrappers.OUTER_SAMPLE, sampling.around),
    ):
        wrap(patched, kind, _KEY, wrapper, first=False)


@dataclass(frozen=True)
class _Estimate:
    """Tells the host what calls need, in the place of `BaseModel.memory_required`.

    Only for as long as the host asks: a function that stays with the model would be one more thing that others who
    patch the model find there. Holds no patcher: it would keep the model alive that keeps it.

    Attributes:
        channels, itemsize: of the UNet's first level.
    """

    settings: MemorySettings
    sampling: _Sampling
    channels: int
    itemsize: int

    def while_preparing(
        self,
        executor: Any,  # noqa: ANN401 - the host's
        model: ModelPatcher,
        noise_shape: Sequence[int],
        *rest: Any,  # noqa: ANN401
        **named: Any,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        """Makes room for the calls of a sampling."""
        device = model.load_device
        options = _transformer_options(rest, named)
        whole_blocks = reach_of(options) is Reach.ALL
        patched, controlled = _output_is_patched(options), _has_control(rest, named)
        more = _WHOLE_BLOCK_MAPS if whole_blocks else 0
        more += _PATCHED_SKIP_MAPS if patched else _CONTROLLED_SKIP_MAPS if controlled else 0
        alone = not ask_for_conditions(options) and _pixels(noise_shape) > _shared_pixels(device)

        def required(input_shape: Sequence[int], cond_shapes: Any = None) -> float:  # noqa: ARG001, ANN401
            shape = noise_shape if alone else input_shape
            return self.settings.needed(shape, self.channels, self.itemsize, device, patched or controlled, more)

        if whole_blocks and not self.sampling.logged:
            self.sampling.logged = True
            logging.info(
                "A patch of another node has to see whole transformer blocks, so that they are not computed in chunks: "
                "a call needs about %.1f GB.",
                required(noise_shape) / 2**30,
            )
        with _answering(model.model, required):
            return executor(model, noise_shape, *rest, **named)

    def while_batching(
        self,
        executor: Any,  # noqa: ANN401 - the host's
        model: comfy.model_base.BaseModel,
        conds: Any,  # noqa: ANN401
        x: torch.Tensor,
        timestep: torch.Tensor,
        model_options: dict[str, Any],
    ) -> Any:  # noqa: ANN401
        """Conditions share a batch where that is faster or needed, whatever memory is free: it changes the rounding."""
        together = ask_for_conditions(model_options.get("transformer_options", {}))
        most = math.inf if together else 2 * _shared_pixels(x.device)

        def required(input_shape: Sequence[int], cond_shapes: Any = None) -> float:  # noqa: ARG001, ANN401
            # A single condition that is refused here runs alone all the same.
            return math.inf if _pixels(input_shape) > most else 0.0

        with _answering(model, required):
            return executor(model, conds, x, timestep, model_options)


def _transformer_options(rest: Sequence[Any], named: Mapping[str, Any]) -> Mapping[str, Any]:
    """Of the arguments behind the noise's shape: conditions and model options."""
    options = named.get("model_options", rest[1] if len(rest) > 1 else None) or {}
    return options.get("transformer_options", {})


def _has_control(rest: Sequence[Any], named: Mapping[str, Any]) -> bool:
    conds = named.get("conds", rest[0] if rest else None) or {}
    return any("control" in cond for group in conds.values() for cond in group)


def _pixels(shape: Sequence[int]) -> int:
    """Latent pixels of all frames [N, C, H, W]."""
    return math.prod(shape[2:]) * shape[0]


def _shared_pixels(device: torch.device) -> int:
    """Latent pixels (frames x height x width) of one condition up to which two share a batch.

    On a CPU a larger batch is never faster, on a GPU only for clips too small to fill it.
    """
    return 0 if comfy.model_management.is_device_cpu(device) else _SHARED_PIXELS


@contextmanager
def _answering(model: comfy.model_base.BaseModel, required: Callable[..., float]) -> Iterator[None]:
    """The model's `memory_required` is another function for the time being."""
    before = vars(model).get("memory_required")
    model.memory_required = required
    try:
        yield
    finally:
        if before is None:
            del model.memory_required
        else:
            model.memory_required = before


class _Sampling:
    """What lives as long as a sampling: the buffers of each device that skip tensors wait in, and what was logged.

    Attributes:
        logged: that blocks are not computed in chunks, which is not said again for every window.
    """

    def __init__(self) -> None:
        self._buffers: dict[torch.device, HostBuffers] = {}
        self.logged = False

    def begin_call(self, device: torch.device) -> HostBuffers:
        if device not in self._buffers:
            self._buffers[device] = buffers_for(device)
        buffers = self._buffers[device]
        buffers.begin()
        return buffers

    def around(self, executor: Any, noise: torch.Tensor, *given: Any, **named: Any) -> Any:  # noqa: ANN401
        if 0 in noise.shape:
            raise ValueError(
                f"The latent is empty: its shape is {list(noise.shape)} (frames, channels, height, width). Give the "
                "sampler a latent of at least 1 frame, such as that of ExVideo Conditioning."
            )
        try:
            return executor(noise, *given, **named)
        finally:
            self._buffers.clear()
            self.logged = False


def _call(settings: MemorySettings, sampling: _Sampling) -> Callable[..., Any]:
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
        options = transformer_options
        with_gradients = torch.is_grad_enabled()
        if control is None and not with_gradients and _reads_no_skips(executor.class_obj, options):
            buffers = sampling.begin_call(x.device) if settings.offload_skips else None
            options = {**options, "patches": _with_skips(options.get("patches", {}), buffers)}
        with chunks.use(chunks.Budget(settings.chunk_bytes(x.device))):
            return executor(x, timesteps, context, y, control, options, **rest)

    return wrapper


def _reads_no_skips(unet: torch.nn.Module, options: dict[str, Any]) -> bool:
    """Whether nothing but our own layers gets to see skip tensors, and what they are joined to."""
    return not _output_is_patched(options) and all(
        isinstance(block[0], BoundedResBlock) for block in unet.output_blocks
    )


def _output_is_patched(options: Mapping[str, Any]) -> bool:
    patches = options.get("patches", {})
    return bool(patches.get("output_block_patch") or patches.get("forward_timestep_embed_patch"))


def _with_skips(patches: dict[str, Any], buffers: HostBuffers | None) -> dict[str, Any]:
    """Patches by which the host keeps `Skip`s, in between a user's own."""

    def keep(h: torch.Tensor, options: dict[str, Any]) -> Skip:  # noqa: ARG001 - the host's signature
        return Skip(h, buffers)

    def go_on(h: Skip, options: dict[str, Any]) -> torch.Tensor:  # noqa: ARG001 - the host's signature
        return h.take()

    kept = [*patches.get("input_block_patch", []), keep]
    return {
        **patches,
        "input_block_patch": kept,
        "input_block_patch_after_skip": [go_on, *patches.get("input_block_patch_after_skip", [])],
    }
