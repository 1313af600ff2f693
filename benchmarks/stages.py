"""The stages of a clip in ComfyUI, one by one in this process, each with what it takes of the card.

Needs `in_process.set_up` first.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from . import in_process
from .model_files import Files

GIB = 2**30
CONDITION, SAMPLE, DECODE, SAVE = "conditioning", "sampling", "decode", "decode to file"


class Meter(Protocol):
    """Reads a card's memory."""

    def begin(self) -> None:
        """Forget the peak so far."""
        ...

    def read(self) -> dict[str, float]:
        """Figures since `begin`."""
        ...

    def copied(self) -> int:
        """Bytes copied to the card so far, as far as they are counted."""
        ...


@dataclass(frozen=True)
class Clip:
    """Pixels and frames."""

    width: int
    height: int
    frames: int

    @property
    def size(self) -> str:
        return f"{self.width}x{self.height}"


@dataclass(frozen=True)
class Sampling:
    """Settings of a sampler's model; the first of `SAMPLING` are what a user gets without any node of ours.

    Attributes:
        offload_skips, chunk_megabytes: of ExVideo Memory.
        tile: width and height in pixels of ExVideo Tiles; 0: whole pictures.
    """

    name: str
    offload_skips: bool = False
    chunk_megabytes: int = 0
    tile: int = 0


@dataclass(frozen=True)
class Decoding:
    """Settings of ExVideo Decode; the first of `DECODING` are its defaults."""

    name: str
    chunk_frames: int
    overlap_frames: int


#: In the order in which they are tried.
SAMPLING = (
    Sampling("defaults"),
    Sampling("skips in RAM", True),
    Sampling("skips in RAM, chunks of 32 MB", True, 32),
    Sampling("skips in RAM, chunks of 32 MB, tiles of 512", True, 32, 512),
)
DECODING = (
    Decoding("defaults", 24, 12),
    Decoding("chunks of 8 frames", 8, 4),
    Decoding("chunks of 4 frames", 4, 2),
)


@dataclass
class Row:
    """What a stage took.

    Attributes:
        error: what it failed with.
        figures: of the meter.
        weights: GiB on the card and in all of each model.
    """

    stage: str
    setting: str
    error: str | None = None
    seconds: float = 0.0
    figures: dict[str, float] = field(default_factory=dict)
    weights: dict[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def fits(self) -> bool:
        return self.error is None


class Run:
    """A clip in the making.

    Args:
        steps: of the sampler, with two conditions each.
        first_chunk_only: decode as many frames as one chunk has: further ones need no more of the card.
    """

    def __init__(self, files: Files, clip: Clip, meter: Meter, steps: int = 1, first_chunk_only: bool = False) -> None:
        from exvideo_core.comfyui.apply.patch import apply_extension
        from exvideo_core.comfyui.checkpoint.load import load_checkpoint
        from exvideo_core.method.extension import Extension

        self._clip, self._meter, self._steps, self._first_chunk_only = clip, meter, steps, first_chunk_only
        model, self._clip_vision, self._vae = load_checkpoint(str(files.checkpoint))
        self._model = apply_extension(model, Extension.load(str(files.extension)))
        self._latent = torch.zeros(clip.frames, 4, clip.height // 8, clip.width // 8)
        self._conditions: Any = None
        self._of_calls: dict[str, float] = {}

    def stages(self) -> Iterable[tuple[Callable[[Any], None], str, tuple[Any, ...]]]:
        """Each stage with its name and the settings to try."""
        yield self._condition, CONDITION, (Sampling("defaults"),)
        tiles_help = max(self._clip.width, self._clip.height) > 512
        yield self._sample, SAMPLE, tuple(setting for setting in SAMPLING if tiles_help or not setting.tile)
        yield self._decode, DECODE, DECODING
        if self._first_chunk_only:
            return
        if importlib.util.find_spec("av") is None:
            logging.warning("av is not installed: no video file is written")
        else:
            yield self._save, SAVE, DECODING

    def measure(self, stage: Callable[[Any], None], name: str, setting: Any) -> Row:  # noqa: ANN401 - of a stage
        """Run a stage with a setting."""
        row = Row(name, setting.name)
        self._of_calls = {}
        self._meter.begin()
        began = time.perf_counter()
        out_of_memory = False
        try:
            with torch.inference_mode():
                stage(setting)
        except Exception as error:  # noqa: BLE001 - figures of the other stages are worth having
            out_of_memory = isinstance(error, torch.OutOfMemoryError)
            row.error = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        row.seconds = time.perf_counter() - began
        row.figures = self._meter.read() | self._of_calls
        loaded = in_process.weights_loaded()
        row.weights = {model: (here / GIB, whole / GIB) for model, (here, whole) in loaded.items()}
        in_process.end_of_node(out_of_memory)
        return row

    def _condition(self, _: Any) -> None:  # noqa: ANN401 - has no settings
        from exvideo_core.comfyui.vae.conditioning import encode_conditioning

        clip = self._clip
        generator = torch.Generator().manual_seed(0)
        picture = torch.rand(1, clip.height, clip.width, 3, generator=generator)
        self._conditions = encode_conditioning(
            self._clip_vision, self._vae, picture, width=clip.width, height=clip.height, fps=30,
            motion_bucket_id=127, noise_aug_strength=0.02, seed=0,
        )  # fmt: skip

    def _sample(self, setting: Sampling) -> None:
        """KSampler as in the pack's workflows, but for the number of steps."""
        import comfy.sample

        from exvideo_core.comfyui.low_memory.chunked_unet import with_memory_settings
        from exvideo_core.comfyui.low_memory.estimate import MemorySettings
        from exvideo_core.comfyui.sampling.tiles import TileSettings, with_tiles

        model = self._model
        if setting.offload_skips or setting.chunk_megabytes:
            model = with_memory_settings(model, MemorySettings(setting.chunk_megabytes, setting.offload_skips))
        if setting.tile:
            model = with_tiles(model, TileSettings(setting.tile // 8, setting.tile // 8, 16))
        model = _linear_guidance(model).clone()
        model.set_model_unet_function_wrapper(self._watched)
        noise = comfy.sample.prepare_noise(self._latent, 0)
        positive, negative = self._conditions
        self._latent = comfy.sample.sample(
            model, noise, self._steps, 2.0, "euler", "karras", positive, negative, self._latent, disable_pbar=True,
            seed=0,
        )  # fmt: skip

    def _watched(self, apply: Callable[..., torch.Tensor], given: dict[str, Any]) -> torch.Tensor:
        """A call of the model by the host's sampler; figures of the last one stay."""
        _synchronize()
        began, before = time.perf_counter(), self._meter.copied()
        out = apply(given["input"], given["timestep"], **given["c"])
        _synchronize()
        self._of_calls = {
            "call_seconds": time.perf_counter() - began,
            "call_copied_gib": (self._meter.copied() - before) / GIB,
            "call_conditions": len(given["cond_or_uncond"]),
        }
        return out

    def _decode(self, setting: Decoding) -> None:
        from exvideo_core.comfyui.vae.decode import decode

        latent = self._latent[: setting.chunk_frames] if self._first_chunk_only else self._latent
        decode(self._vae, latent, setting.chunk_frames, setting.overlap_frames, "smooth")
        _synchronize()

    def _save(self, setting: Decoding) -> None:
        from exvideo_core.comfyui.vae.decode import decode_segments
        from exvideo_core.video.writer import VideoWriter

        with tempfile.TemporaryDirectory() as folder, VideoWriter(Path(folder) / "clip.mp4", 30) as writer:
            for frames in decode_segments(
                self._vae, self._latent, setting.chunk_frames, setting.overlap_frames, "smooth"
            ):
                writer.add((frames * 255).round().clamp(0, 255).byte().cpu().numpy())

    def finite(self) -> bool:
        """Whether the sampled clip has only finite numbers."""
        return math.isfinite(self._latent.abs().max().item())


def _linear_guidance(model: Any) -> Any:  # noqa: ANN401 - a ModelPatcher
    """The host's VideoLinearCFGGuidance, if its nodes can be imported: they ask for more packages than its models."""
    try:
        from comfy_extras.nodes_video_model import VideoLinearCFGGuidance
    except ImportError as error:
        logging.warning("without VideoLinearCFGGuidance: %s", error)
        return model
    return VideoLinearCFGGuidance().patch(model, 2.0)[0]


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
