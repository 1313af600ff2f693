"""Writes the checkpoint and extension for a benchmark, unless they exist.

hollow: full-size sparse files in fp16, whose weights are zeros that use no disk space. random: full-size files with
random weights, generated on the CUDA card. small: files of the tests' small random model.
"""

from __future__ import annotations

import argparse
import json
import math
import struct
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

#: Channels of SVD's 16 transformers.
WIDTHS = [320] * 2 + [640] * 2 + [1280] * 6 + [640] * 3 + [320] * 3
CONTEXT = 1024
FRAMES = 128
#: File names of `random_model.make`.
SMALL = "exvideo_small_random.safetensors", "exvideo_small_random_128f.safetensors"
Shapes = Mapping[str, tuple[int, ...]]


class Files(NamedTuple):
    """Paths of a checkpoint and its extension."""

    checkpoint: Path
    extension: Path


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


def _write_random(path: Path, shapes: Shapes, is_extension: bool) -> None:
    import torch
    from safetensors.torch import save_file

    import random_model

    with torch.device("cuda"):
        if is_extension:
            weights = random_model.random_extension(WIDTHS, CONTEXT, FRAMES, None)
        else:
            weights = {name: random_model.random_weight(name, shape, None).half() for name, shape in shapes.items()}
    save_file({name: value.half().cpu().contiguous() for name, value in weights.items()}, path)


def _write(folder: Path, kind: str) -> None:
    from . import in_process

    in_process.set_up(on_cpu=True)  # with dynamic VRAM, ComfyUI's layers have no shapes before loading
    import random_model
    from exvideo_core.method import tensor_names

    if kind == "small":
        random_model.make(folder)
        return
    shapes = random_model.svd_shapes(), tensor_names.extension_shapes(WIDTHS, CONTEXT, FRAMES)
    folder.mkdir(parents=True, exist_ok=True)
    paths = files(folder, kind)
    for path, wanted in zip(paths, shapes, strict=True):
        part = path.with_suffix(".part")
        if kind == "hollow":
            _write_holes(part, wanted)
        else:
            _write_random(part, wanted, path == paths.extension)
        part.replace(path)


def files(folder: Path, kind: str) -> Files:
    """Paths of the files of a kind in a folder."""
    if kind == "small":
        return Files(folder / "checkpoints" / SMALL[0], folder / "exvideo" / SMALL[1])
    return Files(folder / "svd_xt.safetensors", folder / "ExVideo-SVD-128f-v1.fp16.safetensors")


def make(folder: Path, kind: str) -> Files:
    """Write the files in a separate process, unless they exist."""
    found = files(folder, kind)
    if not all(path.exists() for path in found):
        subprocess.run([sys.executable, "-m", "benchmarks.model_files", str(folder), kind], check=True)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("kind", choices=["hollow", "random", "small"])
    options = parser.parse_args()
    _write(options.folder, options.kind)
    return 0


if __name__ == "__main__":
    sys.exit(main())
