"""What a user's patches of a transformer block have to see: nothing, some frames at a time, or all of them.

Patches of the host's API (`set_model_attn1_patch` and its like) get a block's tensors as the host hands them out:
[conditions x frames, tokens, channels] in a spatial block, [conditions x pixels, frames, channels] in a temporal one.
"""

from __future__ import annotations

import enum
import inspect
import os
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

#: Patches that read or change what the layers of a block hand to each other.
_EVERY_BLOCK = ("attn1_patch", "attn1_output_patch", "middle_patch", "attn2_patch", "attn2_output_patch")
_ONE_BLOCK = ("attn1", "attn2")
#: The host's own nodes whose patches look at single tokens, or at the tokens of one picture, of every condition alike.
#: What they see may be cut along the batch, as long as every part holds all conditions.
_CAN_BE_CUT = frozenset({"nodes_nag", "nodes_hypertile", "nodes_tomesd", "nodes_hypernetwork", "nodes_pag"})


class Reach(enum.Enum):
    """How much of a block's batch its patches have to be given at once."""

    NOTHING = enum.auto()
    PARTS = enum.auto()
    ALL = enum.auto()


def reach_in(options: Mapping[str, Any]) -> Reach:
    """The reach of the patches on the block that the host is at.

    Args:
        options: the host's `transformer_options`, in a block.
    """
    block, number = options.get("block"), options.get("block_index", 0)
    keys = set() if block is None else {tuple(block), (block[0], block[1], number)}
    return _widest(_patches(options, keys))


def reach_of(options: Mapping[str, Any]) -> Reach:
    """The widest reach of patches on every block.

    Those on single blocks are left out: they are made for the UNet's middle, whose tensors are small.
    """
    return _widest(_patches(options, set()))


def ask_for_conditions(options: Mapping[str, Any]) -> bool:
    """Whether a patch tells the conditions of a batch apart, as Normalized Attention Guidance does.

    Such patches have to be given all conditions in one batch, or do nothing.
    """
    patches = [*_patches(options, set())]
    for replaced in options.get("patches_replace", {}).values():
        patches += replaced.values()
    return any("cond_or_uncond" in code.co_consts for code in map(_code, patches) if code is not None)


def _patches(options: Mapping[str, Any], keys: set[tuple[Any, ...]]) -> Iterator[Callable[..., Any]]:
    for name in _EVERY_BLOCK:
        yield from options.get("patches", {}).get(name, [])
    for name in _ONE_BLOCK:
        replaced = options.get("patches_replace", {}).get(name, {})
        yield from (replaced[key] for key in keys if key in replaced)


def _widest(patches: Iterator[Callable[..., Any]]) -> Reach:
    reach = Reach.NOTHING
    for patch in patches:
        if not _can_be_cut(patch):
            return Reach.ALL
        reach = Reach.PARTS
    return reach


def _can_be_cut(patch: Callable[..., Any]) -> bool:
    code = _code(patch)
    if code is None:
        return False
    folder, file = os.path.split(code.co_filename)
    return os.path.basename(folder) == "comfy_extras" and os.path.splitext(file)[0] in _CAN_BE_CUT


def _code(patch: Callable[..., Any]) -> types.CodeType | None:
    """What runs when a function, method or object is called, if it is written in Python."""
    function = patch if inspect.isroutine(patch) else type(patch).__call__
    return getattr(function, "__code__", None)
