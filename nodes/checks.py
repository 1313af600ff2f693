"""Range checks of numeric inputs: before the run if their values are known, otherwise when linked values arrive."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, TypeVar

from comfy_api.v0_0_2 import io

_Execute = TypeVar("_Execute", bound=Callable[..., io.NodeOutput])


def checked(execute: _Execute) -> _Execute:
    """A node's `execute` that rejects numbers outside the ranges of its schema.

    ComfyUI checks typed-in values, but not linked ones.

    Raises:
        ValueError: when called; names the input and its range.
    """

    @functools.wraps(execute)
    def run(cls: type[io.ComfyNode], *args: Any, **kwargs: Any) -> io.NodeOutput:  # noqa: ANN401 - the node's inputs
        given = inspect.signature(execute).bind(cls, *args, **kwargs).arguments
        for item in map(widget_of, cls.define_schema().inputs):
            if isinstance(item, io.Int.Input | io.Float.Input) and item.id in given:
                refuse(outside(item.id, given[item.id], item.min, item.max))
        return execute(cls, *args, **kwargs)

    return run  # type: ignore[return-value] - a function of the same signature


def widget_of(item: io.Input) -> io.Input:
    """The input as its widget shows it, with range and default. An input of several types wraps it."""
    return getattr(item, "input_override", None) or item


def outside(name: str, value: float | None, least: float, most: float) -> str | None:
    """What is wrong with a number, if anything. A value of None is linked and not known yet.

    For inputs of a single type, ComfyUI converts strings from API prompts to numbers; anything else is rejected here.
    """
    try:
        if value is None or (math.isfinite(float(value)) and least <= float(value) <= most):
            return None
    except (TypeError, ValueError):
        pass
    return f"{name} ({value}) must be between {least} and {most}."


def check_chunks(chunk_frames: int | None, overlap_frames: int | None) -> str | None:
    """What is wrong with the segments of a decoding node, if anything."""
    wrong = outside("chunk_frames", chunk_frames, 1, 1024) or outside("overlap_frames", overlap_frames, 0, 1023)
    if wrong is None and chunk_frames is not None and overlap_frames is not None and overlap_frames >= chunk_frames:
        return (
            f"overlap_frames ({overlap_frames}) must be smaller than chunk_frames ({chunk_frames}). "
            "Lower overlap_frames or raise chunk_frames."
        )
    return wrong


def check_tiles(tile_width: int | None, tile_height: int | None, overlap: int | None) -> str | None:
    """What is wrong with tile sizes, if anything."""
    wrong = outside("tile_width", tile_width, 128, 16384) or outside("tile_height", tile_height, 128, 16384)
    wrong = wrong or outside("overlap", overlap, 0, 8192)
    known = [size for size in (tile_width, tile_height) if size is not None]
    if wrong is None and overlap is not None and known and overlap >= min(known):
        return f"overlap ({overlap}) must be smaller than the tiles ({min(known)}). Lower overlap or use larger tiles."
    return wrong


def refuse(wrong: str | None) -> None:
    """Raise ValueError if something is wrong."""
    if wrong is not None:
        raise ValueError(wrong)
