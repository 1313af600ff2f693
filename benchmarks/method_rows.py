"""The rows of `bench method`: their models, and their videos, which are cached in a folder."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch

from exvideo_core.diffusers.sampling import decode
from exvideo_core.post_tuning.samples import Encoder
from exvideo_core.video.windows import freenoise
from small_model import clips, world
from small_model.clips import Sampling

from . import kept, rivals

FRAMES = 128
#: As in the reference's example, in half as many steps, and with the sampler lcm without guidance.
USUAL, LCM = Sampling(), Sampling(25, "lcm", 1.0)
_AT_ONCE = 64  # videos, on a GPU
_CODE = 5  # increase it when videos change, to invalidate the cache
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        name: name in the JSON file.
        title: title in the table.
        extension: an extension's file, "untrained", or None for the base alone.
        windows: generate videos in windows of the base's native length.
        truth: encode and decode the true video with the VAE, which shows the error of decoding and measuring.
        sampling: steps, sampler and guidance.
        rival: "freelong" or "freenoise", applied to the model.
        opponent: name of the row whose videos are compared with this row's, clip by clip; None for no comparison.
    """

    name: str
    title: str
    extension: str | None = None
    windows: bool = False
    truth: bool = False
    sampling: Sampling = USUAL
    rival: str | None = None
    opponent: str | None = "extended"


def main_rows(extension: Path) -> list[Row]:
    """Rows of the main table."""
    return [
        Row("truth", "true video, encoded and decoded", truth=True),
        Row("base", "(a) base"),
        Row("untrained", "(b) base + untrained extension", "untrained"),
        Row("extended", "(c) base + post-tuned extension", str(extension), opponent=None),
        Row("one_call", "(c) in one denoising step", str(extension), sampling=Sampling(1)),
        Row("windows", "(d) base in 25-frame windows", windows=True),
        Row("freelong", "(f) base with FreeLong", rival="freelong"),
        Row("freenoise", "(g) base with FreeNoise", rival="freenoise"),
        Row("extended_lcm", "(c) with lcm, no guidance", str(extension), sampling=LCM, opponent=None),
        Row("windows_lcm", "(d) with lcm, no guidance", windows=True, sampling=LCM, opponent="extended_lcm"),
    ]


def ablation_rows(folder: Path) -> list[Row]:
    """Rows of the ablations, whose extensions are in a folder."""
    return [
        Row("extended_short", "(c) trained as long as (e)", str(folder / "full.safetensors")),
        Row("no_convolution", "(e) without convolution", str(folder / "no_convolution.safetensors")),
        Row("no_positions", "(e) without trained positions", str(folder / "no_positions.safetensors")),
        Row("no_attention", "(e) without temporal attention", str(folder / "no_attention.safetensors")),
    ]


class Maker:
    """Generates the videos of all rows, with one row's model in memory at a time.

    Args:
        base: SVD checkpoint.
        folder: cache folder of the videos.
        device: device of the model.
        half: compute the UNet in bfloat16, compiled: on a CPU, this takes about a third of the time.
    """

    def __init__(self, base: Path, folder: Path, device: str = "cpu", half: bool = False) -> None:
        self.base = base
        self.folder = folder
        self.device = device
        self.half = half
        self._loaded: tuple[str | None, str | None] = (None, None)
        self._svd = None

    def model(self, row: Row):  # noqa: ANN201 - SVD
        """The model of a row, which is kept until another one is requested."""
        from exvideo_core.diffusers import checkpoint, patch
        from exvideo_core.method.extension import Extension
        from exvideo_core.post_tuning.selection import untrained

        wanted = row.extension, row.rival
        if self._svd is None or wanted != self._loaded:
            self._svd = checkpoint.load(self.base)
            unet = self._svd.unet
            if row.extension == "untrained":
                patch.apply(unet, untrained(unet, FRAMES))
            elif row.extension is not None:
                patch.apply(unet, Extension.load(row.extension))
            if row.rival == "freelong":
                largest = (world.SIZE // 8) ** 2
                rivals.change_unet(unet, partial(rivals.freelong, window=self._svd.frames, largest=largest))
            elif row.rival == "freenoise":
                rivals.change_unet(unet, partial(rivals.freenoise_attention, window=self._svd.frames))
            for part in (unet, self._svd.vae, self._svd.image_encoder):
                part.to(self.device)
            if self.half:
                _compute_in_half(unet, compiled=row.rival is None)
            self._loaded = wanted
        return self._svd

    def path(self, row: Row, index: int) -> Path:
        """Cache file of a video. Its name depends on everything that affects the video."""
        parts = [row.name, kept.digest(self.base), row.sampling, FRAMES, _CODE]
        if self.half:
            parts.append("half")
        if row.extension and row.extension != "untrained":
            parts.append(kept.digest(Path(row.extension)))
        return self.folder / f"{row.name}-{kept.key(parts)[:12]}" / f"{index:03d}.npz"

    def clip(self, row: Row, index: int) -> np.ndarray:
        """Video `index` of a row, generated unless it is cached: [128, H, W, 3] in 0..1."""
        self.generate(row, [index])
        return kept.load(self.path(row, index))

    def generate(self, row: Row, indices: Sequence[int]) -> None:
        """Generate the videos of a row that are not cached, at once."""
        missing = [index for index in indices if not self.path(row, index).exists()]
        if not missing:
            return
        for index, video in zip(missing, self._videos(row, missing), strict=True):
            compress = self.device == "cpu"  # which takes longer than a GPU needs for the videos
            kept.save(self.path(row, index), video, compress)

    def _videos(self, row: Row, seeds: list[int]) -> list[np.ndarray]:
        svd, scenes = self.model(row), [world.sample(world.HELD_OUT + seed) for seed in seeds]
        if row.truth:
            encoder = Encoder(svd.vae, svd.image_encoder)
            frames = (world.as_bytes(world.render(clip, FRAMES)) for clip in scenes)
            return [decode(svd, encoder.latents(clip.to(svd.vae.device))) for clip in frames]
        if row.windows:
            return clips.make_in_windows(svd, scenes, FRAMES, svd.frames, seeds, row.sampling)
        noise = None
        if row.rival == "freenoise":
            noise = torch.stack([_freenoise(seed, svd.frames) for seed in seeds])
        return clips.make(svd, scenes, FRAMES, seeds, row.sampling, noise)


def _compute_in_half(unet: torch.nn.Module, compiled: bool) -> None:
    """Make a UNet compute in bfloat16. Its inputs and outputs remain in float32, and so do sampling and decoding."""
    unet.eval().requires_grad_(False).to(torch.bfloat16)
    forward = torch.compile(unet.forward, dynamic=False) if compiled else unet.forward

    def call(
        sample: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        added_time_ids: torch.Tensor,
        return_dict: bool = False,
    ) -> tuple[torch.Tensor]:
        half = sample.to(torch.bfloat16), encoder_hidden_states.to(torch.bfloat16)
        return (forward(half[0], timestep, half[1], added_time_ids, return_dict=return_dict)[0].float(),)

    unet.forward = call


def _freenoise(seed: int, window: int) -> torch.Tensor:
    """FreeNoise's initial noise [T, 4, h, w]: the first window's, shuffled, for all others."""
    noise = torch.randn(FRAMES, 4, world.SIZE // 8, world.SIZE // 8, generator=torch.Generator().manual_seed(seed))
    return freenoise(noise, window, window - max(window // 4, 1), seed)


_maker: Maker


def _start(base: Path, folder: Path, half: bool) -> None:
    global _maker
    torch.set_num_threads(1)
    _maker = Maker(base, folder, half=half)


def _make(row: Row, index: int) -> None:
    _maker.clip(row, index)


def make_all(maker: Maker, wanted: Sequence[tuple[Row, int]], jobs: int) -> None:
    """Generate all videos that are not cached.

    On a GPU, videos are generated in batches. On a CPU, one process per core is faster than one on all cores.
    """
    if maker.device != "cpu":
        for row, count in wanted:
            for start in range(0, count, _AT_ONCE):
                maker.generate(row, range(start, min(start + _AT_ONCE, count)))
            _log.info("Generated %s.", row.name)
        return
    missing = [(row, index) for row, count in wanted for index in range(count) if not maker.path(row, index).exists()]
    _log.info("Generating %d videos ...", len(missing))
    if not missing:
        return
    with get_context("spawn").Pool(jobs, _start, (maker.base, maker.folder, maker.half)) as pool:
        results = [pool.apply_async(_make, task) for task in missing]
        for done, result in enumerate(results, 1):
            result.get()
            if done % 10 == 0 or done == len(results):
                _log.info("%d of %d videos (%s)", done, len(results), missing[done - 1][0].name)
