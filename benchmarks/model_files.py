"""Checkpoints and extensions to measure with: full-size ones that are holes in files, and random ones.

Needs a ComfyUI and the tests' helpers on the path.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch

#: Of the 16 transformers of SVD.
WIDTHS = [320] * 2 + [640] * 2 + [1280] * 6 + [640] * 3 + [320] * 3
CONTEXT = 1024
Shapes = Mapping[str, tuple[int, ...]]


class Files(NamedTuple):
    checkpoint: Path
    extension: Path


def _files(folder: Path) -> Files:
    folder.mkdir(parents=True, exist_ok=True)
    return Files(folder / "svd_xt.safetensors", folder / "ExVideo-SVD-128f-v1.fp16.safetensors")


def full_size_shapes(frames: int = 128) -> tuple[Shapes, Shapes]:
    """Of an SVD checkpoint, and of the published extension."""
    import random_model
    from exvideo_core import layouts

    return random_model.svd_shapes(), layouts.extension_shapes(WIDTHS, CONTEXT, frames)


def hollow(folder: Path) -> Files:
    """Full-size files in fp16 whose numbers are holes: zeros that take no room on a disk."""
    files = _files(folder)
    for path, shapes in zip(files, full_size_shapes(), strict=True):
        _write_holes(path, shapes)
    return files


def _write_holes(path: Path, shapes: Shapes) -> None:
    header, size = {}, 0
    for name, shape in shapes.items():
        end = size + 2 * math.prod(shape)
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [size, end]}
        size = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + size)


def random(folder: Path, device: torch.device, small: bool = False) -> Files:
    """Files of random weights in fp16, made on a device; kept, and found again by later calls.

    Args:
        small: of the tests' small model, and in RAM.
    """
    from safetensors.torch import save_file

    import random_model

    if small:
        import comfy.cli_args

        before = comfy.cli_args.args.cpu
        try:
            return Files(*random_model.make(folder))
        finally:
            comfy.cli_args.args.cpu = before
    files = _files(folder)
    for path, shapes in zip(files, full_size_shapes(), strict=True):
        if path.exists():
            continue
        with device:
            if path == files.extension:
                made = random_model.random_extension(WIDTHS, CONTEXT, 128, None)
            else:
                made = {name: random_model.random_weight(name, shape, None).half() for name, shape in shapes.items()}
        part = path.with_suffix(".part")
        save_file({name: value.half().cpu().contiguous() for name, value in made.items()}, part)
        part.replace(path)
    return files
