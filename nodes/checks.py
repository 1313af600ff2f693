"""Checks of numbers: before a run begins where their values are known, else once they have come by their links."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, TypeVar

from comfy_api.v0_0_2 import io

_Execute = TypeVar("_Execute", bound=Callable[..., io.NodeOutput])


def checked(execute: _Execute) -> _Execute:
    """A node's `execute` that refuses numbers outside of the ranges that the schema gives.

    The host checks values that are typed in, not those that come by link.

    Raises:
        ValueError: on the call, naming the input and its range.
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
    """The input as its widget has it, with range and default: one that takes several types keeps it inside."""
    return getattr(item, "input_override", None) or item


def outside(name: str, value: float | None, least: float, most: float) -> str | None:
    """What is wrong with a number, if anything. None as its value means that it comes by link, and is not known yet.

    The host turns a program's text into a number only where an input takes one type: what else comes is refused here.
    """
    try:
        if value is None or (math.isfinite(float(value)) and least <= float(value) <= most):
            return None
    except (TypeError, ValueError):
        pass
    return f"{name} ({value}) has to be from {least} to {most}."


def check_chunks(chunk_frames: int | None, overlap_frames: int | None) -> str | None:
    """What is wrong with the chunks of a decoding node, if anything."""
    wrong = outside("chunk_frames", chunk_frames, 1, 1024) or outside("overlap_frames", overlap_frames, 0, 1023)
    if wrong is None and chunk_frames is not None and overlap_frames is not None and overlap_frames >= chunk_frames:
        return f"overlap_frames ({overlap_frames}) has to be from 0 to chunk_frames - 1 ({chunk_frames - 1})."
    return wrong


def check_tiles(tile_width: int | None, tile_height: int | None, overlap: int | None) -> str | None:
    """What is wrong with the sizes of tiles, if anything."""
    wrong = outside("tile_width", tile_width, 128, 16384) or outside("tile_height", tile_height, 128, 16384)
    wrong = wrong or outside("overlap", overlap, 0, 8192)
    known = [size for size in (tile_width, tile_height) if size is not None]
    if wrong is None and overlap is not None and known and overlap >= min(known):
        return f"overlap ({overlap}) has to be from 0 to less than a tile ({min(known)})."
    return wrong


def refuse(wrong: str | None) -> None:
    """Raises ValueError where something is wrong."""
    if wrong is not None:
        raise ValueError(wrong)
