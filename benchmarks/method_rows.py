"""The rows of `bench method`: their models, and their videos, which are cached in a folder."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch

from exvideo_core.diffusers.sampling import decode
from exvideo_core.post_tuning.samples import Encoder
from small_model import clips, world

FRAMES = 128
_CODE = 2  # increase it when videos change, to invalidate the cache
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
    """

    name: str
    title: str
    extension: str | None = None
    windows: bool = False
    truth: bool = False


def main_rows(extension: Path) -> list[Row]:
    """Rows of the main table."""
    return [
        Row("truth", "true video, encoded and decoded", truth=True),
        Row("base", "(a) base"),
        Row("untrained", "(b) base + untrained extension", "untrained"),
        Row("extended", "(c) base + post-tuned extension", str(extension)),
        Row("windows", "(d) base in 25-frame windows", windows=True),
    ]


def ablation_rows(folder: Path) -> list[Row]:
    """Rows of the ablations, whose extensions are in a folder."""
    return [
        Row("extended_short", "(c) trained as briefly as (e)", str(folder / "full.safetensors")),
        Row("no_convolution", "(e) without convolution", str(folder / "no_convolution.safetensors")),
        Row("no_positions", "(e) without trained positions", str(folder / "no_positions.safetensors")),
        Row("no_attention", "(e) without temporal attention", str(folder / "no_attention.safetensors")),
    ]


class Maker:
    """Generates the videos of all rows, with one row's model in memory at a time."""

    def __init__(self, base: Path, folder: Path) -> None:
        self.base = base
        self.folder = folder
        self._extension: str | None = None
        self._svd = None

    def model(self, extension: str | None):  # noqa: ANN201 - SVD
        """The base with the given extension, which is kept until another one is requested."""
        from exvideo_core.diffusers import checkpoint, patch
        from exvideo_core.method.extension import Extension
        from exvideo_core.post_tuning.selection import untrained

        if self._svd is None or extension != self._extension:
            self._svd = checkpoint.load(self.base)
            if extension is not None:
                unet = self._svd.unet
                patch.apply(unet, untrained(unet, FRAMES) if extension == "untrained" else Extension.load(extension))
            self._extension = extension
        return self._svd

    def path(self, row: Row, index: int) -> Path:
        """Cache file of a video. Its name depends on everything that affects the video."""
        parts = [row.name, _digest(self.base), clips.STEPS, FRAMES, _CODE]
        if row.extension and row.extension != "untrained":
            parts.append(_digest(Path(row.extension)))
        key = hashlib.sha256(repr(parts).encode()).hexdigest()[:12]
        return self.folder / f"{row.name}-{key}" / f"{index:03d}.npz"

    def clip(self, row: Row, index: int) -> np.ndarray:
        """Video `index` of a row, generated unless it is cached: [128, H, W, 3] in 0..1."""
        path = self.path(row, index)
        if not path.exists():
            svd, clip = self.model(row.extension), world.sample(world.HELD_OUT + index)
            if row.truth:
                frames = world.as_bytes(world.render(clip, FRAMES))
                video = decode(svd, Encoder(svd.vae, svd.image_encoder).latents(frames))
            elif row.windows:
                video = clips.make_in_windows(svd, clip, FRAMES, svd.frames, seed=index)
            else:
                video = clips.make(svd, clip, FRAMES, seed=index)
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(".part.npz")
            np.savez_compressed(part, video=(video * 255).round().astype(np.uint8))
            os.replace(part, path)
        return np.load(path)["video"].astype(np.float32) / 255


_maker: Maker


def _start(base: Path, folder: Path) -> None:
    global _maker
    torch.set_num_threads(1)
    _maker = Maker(base, folder)


def _make(row: Row, index: int) -> None:
    _maker.clip(row, index)


def make_all(base: Path, folder: Path, wanted: Sequence[tuple[Row, int]], jobs: int) -> None:
    """Generate all videos that are not cached. One process per core is faster than one process on all cores."""
    maker = Maker(base, folder)
    missing = [(row, index) for row, count in wanted for index in range(count) if not maker.path(row, index).exists()]
    _log.info("Generating %d videos ...", len(missing))
    if not missing:
        return
    with get_context("spawn").Pool(jobs, _start, (base, folder)) as pool:
        results = [pool.apply_async(_make, task) for task in missing]
        for done, result in enumerate(results, 1):
            result.get()
            if done % 10 == 0 or done == len(results):
                _log.info("%d of %d videos (%s)", done, len(results), missing[done - 1][0].name)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
