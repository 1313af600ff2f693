"""Names and shapes of an extension's tensors, and their names in an SVD checkpoint.

For each of the SVD UNet's 16 temporal transformer blocks, an extension contains the tuned weights of the block, a
position table and a 3x3x3 convolution (paper section 3.2). The names are those of the reference's `SVDUNet.blocks`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence

Shape = tuple[int, ...]

#: Index of each temporal transformer in the reference's flat list of UNet blocks, in the order of execution.
BLOCK_IDS: tuple[int, ...] = (7, 17, 29, 39, 51, 61, 83, 113, 123, 133, 144, 154, 164, 175, 185, 195)

#: Names of the same 16 transformers in the SVD UNet (`model.diffusion_model.` in a checkpoint).
SVD_TRANSFORMERS: tuple[str, ...] = (
    *(f"input_blocks.{i}.1" for i in (1, 2, 4, 5, 7, 8)),
    "middle_block.1",
    *(f"output_blocks.{i}.1" for i in range(3, 12)),
)

#: Metadata keys of sizes that a checkpoint's shapes do not show, and SVD's values.
METADATA_DEFAULTS = {"exvideo.num_head_channels": 64, "exvideo.clip_num_attention_heads": 16}

POSITIONS = "positional_embedding.embeddings"
CONV_WEIGHT = "positional_conv.weight"
CONV_BIAS = "positional_conv.bias"

_LINEAR = ("weight", "bias")


def _shared_modules() -> dict[str, tuple[str, tuple[str, ...]]]:
    """Module in the extension -> (module under the SVD transformer, its parameters)."""
    modules: dict[str, tuple[str, tuple[str, ...]]] = {}
    for index in (0, 2):
        modules[f"positional_embedding_proj.{index}"] = (f"time_pos_embed.{index}", _LINEAR)
    for norm, svd_norm in (("norm_in", "norm_in"), ("norm1", "norm1"), ("norm2", "norm2"), ("norm_out", "norm3")):
        modules[norm] = (f"time_stack.0.{svd_norm}", _LINEAR)
    for end, svd_ff in (("in", "ff_in"), ("out", "ff")):
        modules[f"act_fn_{end}.proj"] = (f"time_stack.0.{svd_ff}.net.0.proj", _LINEAR)
        modules[f"ff_{end}"] = (f"time_stack.0.{svd_ff}.net.2", _LINEAR)
    for attention in ("attn1", "attn2"):
        for projection in ("to_q", "to_k", "to_v"):
            modules[f"{attention}.{projection}"] = (f"time_stack.0.{attention}.{projection}", ("weight",))
        modules[f"{attention}.to_out"] = (f"time_stack.0.{attention}.to_out.0", _LINEAR)
    return modules


#: Name in the extension -> name under the SVD transformer, for the 30 tensors that a block shares with its base.
SHARED_TENSORS: dict[str, str] = {
    f"{module}.{parameter}": f"{svd_module}.{parameter}"
    for module, (svd_module, parameters) in _shared_modules().items()
    for parameter in parameters
}


def block_shapes(channels: int, context_dim: int, frames: int) -> dict[str, Shape]:
    """Shapes of the tensors of one block, by name.

    Args:
        channels: width C of the block.
        context_dim: width of the image embedding that cross-attention reads (1024 in SVD).
        frames: number of rows of the position table.
    """
    c = channels
    shapes: dict[str, Shape] = {
        POSITIONS: (frames, c),
        CONV_WEIGHT: (c, c, 3, 3, 3),
        CONV_BIAS: (c,),
        "positional_embedding_proj.0.weight": (4 * c, c),
        "positional_embedding_proj.0.bias": (4 * c,),
        "positional_embedding_proj.2.weight": (c, 4 * c),
        "positional_embedding_proj.2.bias": (c,),
    }
    for norm in ("norm_in", "norm1", "norm2", "norm_out"):
        shapes[f"{norm}.weight"] = shapes[f"{norm}.bias"] = (c,)
    for end in ("in", "out"):
        shapes[f"act_fn_{end}.proj.weight"] = (8 * c, c)  # GEGLU: value and gate, each 4 C
        shapes[f"act_fn_{end}.proj.bias"] = (8 * c,)
        shapes[f"ff_{end}.weight"] = (c, 4 * c)
        shapes[f"ff_{end}.bias"] = (c,)
    for attention, key_width in (("attn1", c), ("attn2", context_dim)):
        shapes[f"{attention}.to_q.weight"] = (c, c)
        shapes[f"{attention}.to_k.weight"] = shapes[f"{attention}.to_v.weight"] = (c, key_width)
        shapes[f"{attention}.to_out.weight"] = (c, c)
        shapes[f"{attention}.to_out.bias"] = (c,)
    return shapes


def extension_shapes(widths: Sequence[int], context_dim: int, frames: int) -> dict[str, Shape]:
    """Shapes of the tensors of an extension file, by their full names `blocks.<i>.<name>`.

    Args:
        widths: channels of the 16 blocks, in the order of `BLOCK_IDS`.
        context_dim, frames: as in `block_shapes`.
    """
    return {
        f"blocks.{block}.{name}": shape
        for block, width in zip(BLOCK_IDS, widths, strict=True)
        for name, shape in block_shapes(width, context_dim, frames).items()
    }


def layout_md5(shapes: Mapping[str, Iterable[int]]) -> str:
    """MD5 hash of names and shapes, as computed by DiffSynth's model detection.

    The hash of the published file is `9a4ab6869ac9b7d6e31f9854e397c867`.
    """
    entries = []
    for name, shape in shapes.items():
        entries += [name, f"{name}:{'_'.join(map(str, shape))}"]
    return hashlib.md5(",".join(sorted(entries)).encode(), usedforsecurity=False).hexdigest()
