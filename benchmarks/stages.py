"""Runs the stages of a video in ComfyUI in this process, and measures each stage's memory on the card.

Call `in_process.set_up` first.
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
    """Measures a card's memory."""

    def begin(self) -> None:
        """Reset the peak."""
        ...

    def read(self) -> dict[str, float]:
        """Measurements since `begin`, in GiB."""
        ...

    def copied(self) -> int:
        """Bytes copied to the card so far, or 0 if they are not counted."""
        ...


@dataclass(frozen=True)
class Video:
    """Size of a video: width and height in pixels, and number of frames."""

    width: int
    height: int
    frames: int

    @property
    def size(self) -> str:
        """Width x height."""
        return f"{self.width}x{self.height}"


@dataclass(frozen=True)
class Sampling:
    """Settings for sampling. The first of `SAMPLING` are the defaults.

    Attributes:
        name: name in the results.
        offload_skips, chunk_megabytes: settings of ExVideo Memory.
        tile: tile width and height of ExVideo Tiles in pixels, or 0 for no tiles.
    """

    name: str
    offload_skips: bool = False
    chunk_megabytes: int = 0
    tile: int = 0


@dataclass(frozen=True)
class Decoding:
    """Settings of ExVideo Decode. The first of `DECODING` are its defaults."""

    name: str
    chunk_frames: int
    overlap_frames: int


#: Settings in the order in which they are tried.
SAMPLING = (
    Sampling("defaults"),
    Sampling("skip connections in RAM", True),
    Sampling("skip connections in RAM, chunks of 32 MB", True, 32),
    Sampling("skip connections in RAM, chunks of 32 MB, tiles of 512", True, 32, 512),
)
DECODING = (
    Decoding("defaults", 24, 12),
    Decoding("segments of 8 frames", 8, 4),
    Decoding("segments of 4 frames", 4, 2),
)


@dataclass
class Row:
    """Measurements of a stage.

    Attributes:
        stage: name of the stage.
        setting: name of its settings.
        error: the exception, if it failed.
        seconds: run time.
        figures: measurements of the meter.
        weights: GiB on the card and total GiB of each model.
    """

    stage: str
    setting: str
    error: str | None = None
    seconds: float = 0.0
    figures: dict[str, float] = field(default_factory=dict)
    weights: dict[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def fits(self) -> bool:
        """Whether the stage succeeded."""
        return self.error is None


class Run:
    """The stages of one video.

    Args:
        files: checkpoint and extension.
        video: size of the video.
        meter: measures the card's memory.
        steps: sampler steps, with two conditions each.
        first_segment_only: decode only one segment; further ones do not need more memory.
    """

    def __init__(
        self, files: Files, video: Video, meter: Meter, steps: int = 1, first_segment_only: bool = False
    ) -> None:
        from exvideo_core.comfyui.apply.patch import apply_extension
        from exvideo_core.comfyui.checkpoint.load import load_checkpoint
        from exvideo_core.method.extension import Extension

        self._video, self._meter, self._steps, self._first_segment_only = video, meter, steps, first_segment_only
        model, self._clip_vision, self._vae = load_checkpoint(str(files.checkpoint))
        self._model = apply_extension(model, Extension.load(str(files.extension)))
        self._latent = torch.zeros(video.frames, 4, video.height // 8, video.width // 8)
        self._conditions: Any = None
        self._call_figures: dict[str, float] = {}

    def stages(self) -> Iterable[tuple[Callable[[Any], None], str, tuple[Any, ...]]]:
        """(function, name, settings to try) of each stage."""
        yield self._condition, CONDITION, (Sampling("defaults"),)
        tiles_help = max(self._video.width, self._video.height) > 512
        yield self._sample, SAMPLE, tuple(setting for setting in SAMPLING if tiles_help or not setting.tile)
        yield self._decode, DECODE, DECODING
        if self._first_segment_only:
            return
        if importlib.util.find_spec("av") is None:
            logging.warning("av is not installed, so no video file is written.")
        else:
            yield self._save, SAVE, DECODING

    def measure(self, stage: Callable[[Any], None], name: str, setting: Any) -> Row:  # noqa: ANN401 - of a stage
        """Run a stage with a setting. Errors are recorded in the row."""
        row = Row(name, setting.name)
        self._call_figures = {}
        self._meter.begin()
        began = time.perf_counter()
        out_of_memory = False
        try:
            with torch.inference_mode():
                stage(setting)
        except Exception as error:  # noqa: BLE001 - the other stages' results are still useful
            out_of_memory = isinstance(error, torch.OutOfMemoryError)
            row.error = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        row.seconds = time.perf_counter() - began
        row.figures = self._meter.read() | self._call_figures
        loaded = in_process.weights_loaded()
        row.weights = {model: (on_card / GIB, total / GIB) for model, (on_card, total) in loaded.items()}
        in_process.end_of_node(out_of_memory)
        return row

    def _condition(self, _: Any) -> None:  # noqa: ANN401 - has no settings
        from exvideo_core.comfyui.vae.conditioning import encode_conditioning

        video = self._video
        generator = torch.Generator().manual_seed(0)
        image = torch.rand(1, video.height, video.width, 3, generator=generator)
        self._conditions = encode_conditioning(
            self._clip_vision, self._vae, image, width=video.width, height=video.height, fps=30,
            motion_bucket_id=127, noise_aug_strength=0.02, seed=0,
        )  # fmt: skip

    def _sample(self, setting: Sampling) -> None:
        """Sample like KSampler in the pack's workflows, except for the number of steps."""
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
        model.set_model_unet_function_wrapper(self._measured_call)
        noise = comfy.sample.prepare_noise(self._latent, 0)
        positive, negative = self._conditions
        self._latent = comfy.sample.sample(
            model, noise, self._steps, 2.0, "euler", "karras", positive, negative, self._latent, disable_pbar=True,
            seed=0,
        )  # fmt: skip

    def _measured_call(self, apply: Callable[..., torch.Tensor], arguments: dict[str, Any]) -> torch.Tensor:
        """Model function wrapper that measures each call; the last one's measurements are kept."""
        _synchronize()
        began, before = time.perf_counter(), self._meter.copied()
        out = apply(arguments["input"], arguments["timestep"], **arguments["c"])
        _synchronize()
        self._call_figures = {
            "call_seconds": time.perf_counter() - began,
            "call_copied_gib": (self._meter.copied() - before) / GIB,
            "call_conditions": len(arguments["cond_or_uncond"]),
        }
        return out

    def _decode(self, setting: Decoding) -> None:
        from exvideo_core.comfyui.vae.decode import decode

        latent = self._latent[: setting.chunk_frames] if self._first_segment_only else self._latent
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
        """Whether all sampled latents are finite."""
        return math.isfinite(self._latent.abs().max().item())


def _linear_guidance(model: Any) -> Any:  # noqa: ANN401 - a ModelPatcher
    """Apply ComfyUI's VideoLinearCFGGuidance, if its module can be imported: it needs additional packages."""
    try:
        from comfy_extras.nodes_video_model import VideoLinearCFGGuidance
    except ImportError as error:
        logging.warning("VideoLinearCFGGuidance is not used: %s", error)
        return model
    return VideoLinearCFGGuidance().patch(model, 2.0)[0]


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
