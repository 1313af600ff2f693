"""Generated videos that benchmarks keep in the cache folder, so that an interrupted run can be resumed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np


@cache
def digest(path: Path) -> str:
    """Hash of a file, which identifies a model."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def key(parts: Sequence[object]) -> str:
    """Name of a cache folder for everything that affects its videos."""
    return hashlib.sha256(repr(list(parts)).encode()).hexdigest()[:16]


def save(path: Path, video: np.ndarray, compress: bool = True, **more: object) -> None:
    """Write a video [T, H, W, 3], uint8 or in 0..1, completely or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = video if video.dtype == np.uint8 else (video * 255).round().astype(np.uint8)
    part = path.with_suffix(".part.npz")
    (np.savez_compressed if compress else np.savez)(part, video=pixels, **more)
    os.replace(part, path)


def load(path: Path) -> np.ndarray:
    """Read a video: [T, H, W, 3] in 0..1."""
    return np.load(path)["video"].astype(np.float32) / 255
