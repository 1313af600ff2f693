"""The rows of the method's table: which model makes each row's clips, and the clips, kept in a folder."""

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
_CODE = 2  # to be raised when clips come out different: kept ones are then made anew
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
        name: in the table's JSON.
        title: what it is, in words.
        extension: an extension's file, "untrained" for a fresh one, or None for the bare base.
        windows: the clip is made in windows of the base's own length.
        truth: the true clip through the VAE alone: what measuring and decoding cost.
    """

    name: str
    title: str
    extension: str | None = None
    windows: bool = False
    truth: bool = False


def main_rows(extension: Path) -> list[Row]:
    return [
        Row("truth", "true clip through the VAE", truth=True),
        Row("base", "(a) base as it is"),
        Row("untrained", "(b) base + untrained extension", "untrained"),
        Row("extended", "(c) base + post-tuned extension", str(extension)),
        Row("windows", "(d) base in 25-frame windows", windows=True),
    ]


def ablation_rows(folder: Path) -> list[Row]:
    return [
        Row("extended_short", "(c) at the ablations' steps", str(folder / "full.safetensors")),
        Row("no_convolution", "(e) without the convolution", str(folder / "no_convolution.safetensors")),
        Row("no_positions", "(e) without trained positions", str(folder / "no_positions.safetensors")),
        Row("no_attention", "(e) without temporal attention", str(folder / "no_attention.safetensors")),
    ]


class Maker:
    """Makes clips of rows, holding one row's model at a time."""

    def __init__(self, base: Path, folder: Path) -> None:
        self.base = base
        self.folder = folder
        self._extension: str | None = None
        self._svd = None

    def model(self, extension: str | None):  # noqa: ANN201 - SVD
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
        """Named by all that decides the clip."""
        parts = [row.name, _digest(self.base), clips.STEPS, FRAMES, _CODE]
        if row.extension and row.extension != "untrained":
            parts.append(_digest(Path(row.extension)))
        key = hashlib.sha256(repr(parts).encode()).hexdigest()[:12]
        return self.folder / f"{row.name}-{key}" / f"{index:03d}.npz"

    def clip(self, row: Row, index: int) -> np.ndarray:
        """Clip `index` of a row, from the folder or made now: 0..1 [128, H, W, 3]."""
        path = self.path(row, index)
        if not path.exists():
            svd, clip = self.model(row.extension), world.sample(world.HELD_OUT + index)
            if row.truth:
                pictures = world.as_bytes(world.render(clip, FRAMES))
                video = decode(svd, Encoder(svd.vae, svd.image_encoder).latents(pictures))
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
    """Make the clips that are not in the folder yet: one process a core is faster than one on all of them."""
    maker = Maker(base, folder)
    missing = [(row, index) for row, count in wanted for index in range(count) if not maker.path(row, index).exists()]
    _log.info("%d clips to make", len(missing))
    if not missing:
        return
    with get_context("spawn").Pool(jobs, _start, (base, folder)) as pool:
        results = [pool.apply_async(_make, task) for task in missing]
        for done, result in enumerate(results, 1):
            result.get()
            if done % 10 == 0 or done == len(results):
                _log.info("%d of %d clips (%s)", done, len(results), missing[done - 1][0].name)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
