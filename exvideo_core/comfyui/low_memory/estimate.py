"""Estimates the memory of a call of an extended UNet, by which ComfyUI frees memory before sampling."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import comfy.model_base
import comfy.model_management
import torch

from .attention_patches import PatchScope, needs_all_conditions, widest_scope
from .budget import DEFAULT_CHUNK_BYTES, MEGABYTE

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

#: Feature maps of full size and of the UNet's first width at a call's peak, in the first block of the last level: its
#: input of twice the width, its output, and, unless they are offloaded, three skip connections.
_MAPS, _SKIP_MAPS = 3, 3
#: Additional maps if a transformer block is not computed in chunks (ComfyUI's feed-forward needs up to 17 times its
#: input, plus the input, its norm and the result), if a patch changes skip connections (FreeU_V2's Fourier transforms),
#: and if ControlNets add to them (each is then concatenated as a whole, to twice the width).
_WHOLE_BLOCK_MAPS, _PATCHED_SKIP_MAPS, _CONTROLLED_SKIP_MAPS = 20, 8, 2
#: Chunk-sized intermediates that exist at once.
_CHUNKS = 4
#: Chunk sizes in MiB, for cards of up to so many GiB. Larger chunks need fewer kernel launches, which fast cards wait
#: for. They depend on the card and not on the memory that is free: kernels round differently for other sizes, and the
#: same seed has to give the same video.
_CHUNK_MEGABYTES_OF_CARDS = ((10, 128), (20, 256), (math.inf, 512))
#: Latent pixels (frames x height x width) up to which one condition is assumed not to fill a GPU: 32 frames of 512x512,
#: of which the lowest level has 2,048 tokens.
_SHARED_PIXELS = 2**17


@dataclass(frozen=True)
class MemorySettings:
    """How the calls of a model are split.

    Attributes:
        chunk_megabytes: size of a chunk's widest intermediate; 0 chooses it by the size of the card.
        offload_skips: keep skip connections in host memory.
    """

    chunk_megabytes: int = 0
    offload_skips: bool = False

    def chunk_bytes(self, device: torch.device) -> int:
        """The size of a chunk on a device."""
        if self.chunk_megabytes:
            return self.chunk_megabytes * MEGABYTE
        if device.type == "cpu":
            return DEFAULT_CHUNK_BYTES
        total = comfy.model_management.get_total_memory(device) / 2**30
        return next(size for limit, size in _CHUNK_MEGABYTES_OF_CARDS if total <= limit) * MEGABYTE

    def required_bytes(
        self,
        shape: Sequence[int],
        channels: int,
        itemsize: int,
        device: torch.device,
        keep_skips: bool = False,
        more_maps: int = 0,
    ) -> float:
        """Bytes that a call needs on a device besides the weights.

        Args:
            shape: of the latents [N, C, H, W], N being the frames of all conditions in the call.
            channels: of the UNet's first level.
            itemsize: bytes of a number.
            keep_skips: skip connections stay on the device, whatever the settings say: another node reads them.
            more_maps: what other nodes add, in feature maps of full size and of the first width.
        """
        area = shape[0] * math.prod(shape[2:]) * channels * itemsize
        maps = _MAPS + more_maps + (0 if self.offload_skips and not keep_skips else _SKIP_MAPS)
        return area * maps * 1.1 + self.chunk_bytes(device) * _CHUNKS


class Estimate:
    """Replaces `BaseModel.memory_required` while ComfyUI calls it.

    A permanent replacement could conflict with other patches. The estimate does not refer to a patcher, because this
    would keep the model alive, which in turn keeps this estimate.

    Args:
        channels, itemsize: of the UNet's first level.
    """

    def __init__(self, settings: MemorySettings, channels: int, itemsize: int) -> None:
        self._settings, self._channels, self._itemsize = settings, channels, itemsize
        self._logged = False

    def reset(self) -> None:
        """A sampling has ended: the next one logs again."""
        self._logged = False

    def prepare_sampling(
        self,
        executor: Any,  # noqa: ANN401 - ComfyUI's
        model: ModelPatcher,
        noise_shape: Sequence[int],
        *rest: Any,  # noqa: ANN401
        **named: Any,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        """PREPARE_SAMPLING wrapper: reserves memory for the calls of a sampling."""
        device = model.load_device
        options = _transformer_options(rest, named)
        whole_blocks = widest_scope(options) is PatchScope.WHOLE
        patched, controlled = skips_are_patched(options), _has_control(rest, named)
        more = _WHOLE_BLOCK_MAPS if whole_blocks else 0
        more += _PATCHED_SKIP_MAPS if patched else _CONTROLLED_SKIP_MAPS if controlled else 0
        alone = not needs_all_conditions(options) and _pixels(noise_shape) > _shared_pixels(device)

        def required(input_shape: Sequence[int], cond_shapes: Any = None) -> float:  # noqa: ARG001, ANN401
            shape = noise_shape if alone else input_shape
            keep_skips = patched or controlled
            return self._settings.required_bytes(shape, self._channels, self._itemsize, device, keep_skips, more)

        if whole_blocks and not self._logged:
            self._logged = True
            logging.info(
                "Another node's attention patch needs whole transformer blocks, so they are not computed in chunks: "
                "each call needs about %.1f GB.",
                required(noise_shape) / 2**30,
            )
        with _memory_required_as(model.model, required):
            return executor(model, noise_shape, *rest, **named)

    def calc_cond_batch(
        self,
        executor: Any,  # noqa: ANN401 - ComfyUI's
        model: comfy.model_base.BaseModel,
        conds: Any,  # noqa: ANN401
        x: torch.Tensor,
        timestep: torch.Tensor,
        model_options: dict[str, Any],
    ) -> Any:  # noqa: ANN401
        """CALC_COND_BATCH wrapper: conditions share a batch where that is faster or required.

        This does not depend on free memory, because batching changes the rounding.
        """
        together = needs_all_conditions(model_options.get("transformer_options", {}))
        max_pixels = math.inf if together else 2 * _shared_pixels(x.device)

        def required(input_shape: Sequence[int], cond_shapes: Any = None) -> float:  # noqa: ARG001, ANN401
            # ComfyUI runs a single condition alone even if it does not fit.
            return math.inf if _pixels(input_shape) > max_pixels else 0.0

        with _memory_required_as(model, required):
            return executor(model, conds, x, timestep, model_options)


def skips_are_patched(options: Mapping[str, Any]) -> bool:
    """Whether a patch of another node reads or changes skip connections.

    Args:
        options: ComfyUI's `transformer_options`.
    """
    patches = options.get("patches", {})
    return bool(patches.get("output_block_patch") or patches.get("forward_timestep_embed_patch"))


def _transformer_options(rest: Sequence[Any], named: Mapping[str, Any]) -> Mapping[str, Any]:
    """From the arguments after the noise's shape: conditions and model options."""
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

    On a CPU a larger batch is never faster, on a GPU only for videos too small to fill it.
    """
    return 0 if comfy.model_management.is_device_cpu(device) else _SHARED_PIXELS


@contextmanager
def _memory_required_as(model: comfy.model_base.BaseModel, required: Callable[..., float]) -> Iterator[None]:
    """Replace the model's `memory_required` within this context."""
    before = vars(model).get("memory_required")
    model.memory_required = required
    try:
        yield
    finally:
        if before is None:
            del model.memory_required
        else:
            model.memory_required = before
