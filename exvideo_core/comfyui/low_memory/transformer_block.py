"""ComfyUI's transformer block on a chunk of sequences, in place wherever that is exact."""

from __future__ import annotations

from typing import Any

import torch
from comfy.ldm.modules import attention as comfy_attention
from comfy.ldm.modules.attention import BasicTransformerBlock, CrossAttention, FeedForward
from torch.nn import functional

from .cast_weights import CastWeights
from .overrides import is_plain_block

#: Tokens per pass of a feed-forward layer on a CPU: what lies between its two products then stays in the caches.
_FEED_FORWARD_TOKENS = 1024


def transformer_block(
    block: BasicTransformerBlock,
    x: torch.Tensor,
    context: torch.Tensor,
    options: dict[str, Any],
    weights: CastWeights,
) -> None:
    """Run a transformer block in place, without the user's attention patches.

    With a context of one token, cross-attention is a constant: a softmax over one key is 1 whatever the query, so the
    layer equals `to_out(to_v(context))`. A user's attention override is still called.

    Args:
        x: contiguous sequences [N, L, C].
        context: [N, S, D], or [1, S, D] for all sequences.
        options: ComfyUI's `transformer_options`.
    """
    if not is_plain_block(block):
        x.copy_(block(x, context=context.expand(x.shape[0], -1, -1), transformer_options=options))
        return
    if block.ff_in:
        _add_feed_forward(x, block.norm_in, block.ff_in, weights, residual=block.is_res)
    constant: torch.Tensor | None = None
    cross = block.attn2
    if (
        cross is not None
        and context.shape[1] == 1
        and "optimized_attention_override" not in options
        and is_plain_block(cross)
    ):
        constant = weights.linear(cross.to_out[0], weights.linear(cross.to_v, context))
    normed = weights.layer_norm(block.norm1, x)
    shared = constant is not None and len(constant) == 1
    x.add_(_attention(normed, normed, block.attn1, weights, options, constant.flatten() if shared else None))
    if constant is not None and not shared:
        x.add_(constant)
    elif cross is not None and constant is None:
        expanded = context.expand(x.shape[0], -1, -1)
        x.add_(_attention(weights.layer_norm(block.norm2, x), expanded, cross, weights, options))
    _add_feed_forward(x, block.norm3, block.ff, weights, residual=block.is_res)


def _attention(
    query: torch.Tensor,
    context: torch.Tensor,
    attention: CrossAttention,
    weights: CastWeights,
    options: dict[str, Any],
    shift: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of `query` [N, L, C] to `context` [N, S, D], plus `shift` [C]."""
    if not is_plain_block(attention):
        out = attention(query, context=context, transformer_options=options)
        return out if shift is None else out + shift
    q = weights.linear(attention.to_q, query)
    k = weights.linear(attention.to_k, context)
    v = weights.linear(attention.to_v, context)
    precision = attention.attn_precision
    # Looked up at every call: other packs install their own kernels there.
    out = comfy_attention.optimized_attention(
        q, k, v, attention.heads, attn_precision=precision, transformer_options=options
    )
    return weights.linear(attention.to_out[0], out, shift)


def _add_feed_forward(
    x: torch.Tensor, norm: torch.nn.LayerNorm, feed_forward: FeedForward, weights: CastWeights, residual: bool
) -> None:
    """x += net(norm(x)), or x = net(norm(x)) without `residual`, in place. x: contiguous [..., C]."""
    tokens = x.view(-1, x.shape[-1])
    if not is_plain_block(feed_forward):
        out = feed_forward(weights.layer_norm(norm, x))
        x.copy_(x + out if residual else out)
        return
    geglu, last = feed_forward.net[0], feed_forward.net[2]
    plain = is_plain_block(geglu) and weights.is_plain(geglu.proj)
    if plain:
        # Two products of half the width: each result is contiguous, which pointwise kernels read twice as fast.
        weight, bias = weights(geglu.proj)
        value_weight, gate_weight = weight.chunk(2)
        value_bias, gate_bias = (None, None) if bias is None else bias.chunk(2)
    size = _FEED_FORWARD_TOKENS if x.device.type == "cpu" else len(tokens)
    for part in tokens.split(size):
        normed = weights.layer_norm(norm, part)
        if plain:
            hidden = functional.gelu(functional.linear(normed, gate_weight, gate_bias))
            hidden.mul_(functional.linear(normed, value_weight, value_bias))
        else:
            hidden = geglu(normed)
        if residual:
            part.add_(weights.linear(last, hidden))
        else:
            weights.linear_into(part, last, hidden)
