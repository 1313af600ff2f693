"""How much of a transformer block's batch the user's attention patches have to see: none, a chunk, or all of it.

Patches (`set_model_attn1_patch` and its like) get a block's tensors as ComfyUI passes them:
[conditions x frames, tokens, channels] in a spatial block, [conditions x pixels, frames, channels] in a temporal one.
"""

from __future__ import annotations

import enum
import inspect
import os
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

#: Patches that read or change what the layers of a block pass to each other.
_EVERY_BLOCK = ("attn1_patch", "attn1_output_patch", "middle_patch", "attn2_patch", "attn2_output_patch")
_ONE_BLOCK = ("attn1", "attn2")
#: ComfyUI's own nodes whose patches look at single tokens, or at the tokens of one image, of every condition alike.
#: They accept a part of the batch, as long as it contains all conditions.
_CHUNKABLE_NODES = frozenset({"nodes_nag", "nodes_hypertile", "nodes_tomesd", "nodes_hypernetwork", "nodes_pag"})


class PatchScope(enum.Enum):
    """How much of a block's batch its patches need at once."""

    NONE = enum.auto()
    CHUNK = enum.auto()
    WHOLE = enum.auto()


def scope_at_block(options: Mapping[str, Any]) -> PatchScope:
    """The scope of the patches on the block that is being computed.

    Args:
        options: ComfyUI's `transformer_options`, inside a block.
    """
    block, number = options.get("block"), options.get("block_index", 0)
    keys = set() if block is None else {tuple(block), (block[0], block[1], number)}
    return _widest(_patches(options, keys))


def widest_scope(options: Mapping[str, Any]) -> PatchScope:
    """The widest scope of the patches that apply to every block.

    Patches on single blocks are left out: they target the UNet's middle, whose tensors are small.
    """
    return _widest(_patches(options, set()))


def needs_all_conditions(options: Mapping[str, Any]) -> bool:
    """Whether a patch distinguishes the conditions of a batch, as Normalized Attention Guidance does.

    Such a patch has no effect unless all conditions are in one batch.
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


def _widest(patches: Iterator[Callable[..., Any]]) -> PatchScope:
    scope = PatchScope.NONE
    for patch in patches:
        if not _is_chunkable(patch):
            return PatchScope.WHOLE
        scope = PatchScope.CHUNK
    return scope


def _is_chunkable(patch: Callable[..., Any]) -> bool:
    code = _code(patch)
    if code is None:
        return False
    folder, file = os.path.split(code.co_filename)
    return os.path.basename(folder) == "comfy_extras" and os.path.splitext(file)[0] in _CHUNKABLE_NODES


def _code(patch: Callable[..., Any]) -> types.CodeType | None:
    """The code that runs when a function, method or object is called, if it is written in Python."""
    function = patch if inspect.isroutine(patch) else type(patch).__call__
    return getattr(function, "__code__", None)
