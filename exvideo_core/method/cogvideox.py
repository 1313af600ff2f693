"""CogVideoX on plain tensors: the reference's rotary positions, and the names of diffusers' files in ComfyUI."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ..files.safetensors_header import Header, ModelFileError, read_header

if TYPE_CHECKING:
    import torch

    #: Maps the rows, columns and frames of a grid of patches to cos and sin [T * H * W, head width].
    Rotary = Callable[[int, int, int, torch.device], tuple[torch.Tensor, torch.Tensor]]

_SHARD = re.compile(r"(?P<stem>.+-)(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")
_THETA = 10000.0


def reference_rotary(base: tuple[int, int], head_dim: int) -> Rotary:
    """Rotary embedding of CogVideoX 1.0, as in DiffSynth's `CogDiT.prepare_rotary_positional_embeddings`.

    Args:
        base: rows and columns of patches that the model was trained with.
        head_dim: width of an attention head; a quarter is for time, three eighths each for rows and columns.
    """
    import torch

    widths = (head_dim // 4, head_dim // 8 * 3, head_dim // 8 * 3)

    def rotary(h: int, w: int, t: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        (top, bottom), (left, right) = crop_region((h, w), base)
        places = (_spaced(0, t, t), _spaced(top, bottom, h), _spaced(left, right, w))
        angles = []
        for axis, (place, width) in enumerate(zip(places, widths, strict=True)):
            frequencies = 1.0 / _THETA ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
            own = torch.outer(place, frequencies).repeat_interleave(2, dim=-1)
            shape = [1, 1, 1, width]
            shape[axis] = len(place)
            angles.append(own.view(shape).expand(t, h, w, width))
        joined = torch.cat(angles, dim=-1).reshape(t * h * w, -1)
        return joined.cos().to(device), joined.sin().to(device)

    return rotary


def _spaced(start: float, stop: float, count: int) -> torch.Tensor:
    """`count` evenly spaced values from `start`, without `stop`."""
    import torch

    return (start + torch.arange(count, dtype=torch.float64) * (stop - start) / count).float()


def crop_region(grid: tuple[int, int], base: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """The centered region of the trained grid that has the aspect ratio of `grid` (rows, columns).

    Returns:
        first and last row, first and last column.
    """
    height, width = base
    if grid[0] / grid[1] > height / width:
        resized = height, int(round(height / grid[0] * grid[1]))
    else:
        resized = int(round(width / grid[1] * grid[0])), width
    top, left = (int(round((whole - part) / 2)) for whole, part in zip(base, resized, strict=True))
    return (top, top + resized[0]), (left, left + resized[1])


#: Layers of a transformer block, by diffusers' names -> ComfyUI's.
BLOCK_MODULES: Mapping[str, str] = {
    "attn1.norm_q": "norm_q",
    "attn1.norm_k": "norm_k",
    "attn1.to_q": "q",
    "attn1.to_k": "k",
    "attn1.to_v": "v",
    "attn1.to_out.0": "attn_out",
    "ff.net.0.proj": "ff_proj",
    "ff.net.2": "ff_out",
    "norm1.linear": "norm1.linear",
    "norm1.norm": "norm1.norm",
    "norm2.linear": "norm2.linear",
    "norm2.norm": "norm2.norm",
}
_DIFFUSERS = re.compile(r"transformer_blocks\.(?P<block>\d+)\.(?P<module>.+)\.(?P<parameter>weight|bias)")


def host_name(name: str) -> str | None:
    """ComfyUI's name of a tensor of diffusers' `CogVideoXTransformer3DModel`, or None if it has no such tensor."""
    match = _DIFFUSERS.fullmatch(name)
    if match is not None:
        module = BLOCK_MODULES.get(match["module"])
        return None if module is None else f"blocks.{match['block']}.{module}.{match['parameter']}"
    name = re.sub(r"^(time|ofs)_embedding\.linear_", r"\1_embedding_linear_", name)
    known = ("patch_embed.", "time_embedding_linear_", "ofs_embedding_linear_", "norm_final.", "norm_out.", "proj_out.")
    return name if name.startswith(known) else None


def shards(path: str | os.PathLike[str]) -> list[Path]:
    """All files of a model, from any of them.

    Raises:
        ModelFileError: one is missing.
    """
    path = Path(path)
    match = _SHARD.fullmatch(path.name)
    if match is None:
        return [path]
    count = int(match["count"])
    names = [f"{match['stem']}{number:05d}-of-{match['count']}.safetensors" for number in range(1, count + 1)]
    missing = [name for name in names if not (path.parent / name).is_file()]
    if missing:
        raise ModelFileError(path, f"is one of {count} files, but {missing[0]} is missing.", "Put all into one folder.")
    return [path.parent / name for name in names]


def check_diffusers_transformer(path: str | os.PathLike[str]) -> Header:
    """The header of a CogVideoX transformer in diffusers' layout, or of a shard of one.

    Raises:
        ModelFileError: the file is something else.
    """
    header = read_header(path)
    unknown = [name for name in header.shapes if host_name(name) is None]
    if unknown:
        raise ModelFileError(
            path, f"is not a CogVideoX transformer in diffusers' layout: it contains {unknown[0]}.", "Use the files in "
            "the folder transformer of zai-org/CogVideoX-5b, or load other layouts with Load Diffusion Model.",
        )  # fmt: skip
    return header
