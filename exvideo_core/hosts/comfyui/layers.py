"""The layers of SVD's blocks on chunks of tokens, in place wherever that is exact."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from comfy.ldm.modules.attention import BasicTransformerBlock, CrossAttention, FeedForward, optimized_attention
from torch.nn import functional

from ... import winograd
from .resident import Resident

#: Patches of a user that read or change what the layers of a transformer block hand to each other.
_BLOCK_PATCHES = ("attn1_patch", "attn1_output_patch", "middle_patch", "attn2_patch", "attn2_output_patch")
_REPLACED = ("attn1", "attn2")
#: Tokens of one pass of a feed-forward layer on a CPU: what lies between its two products stays in the caches.
_FEED_FORWARD_TOKENS = 1024


def adopt(module: torch.nn.Module, base: torch.nn.Module) -> None:
    """Make a module of the base's own submodules and settings: the same weights, under the same names.

    Its class's own `__init__` would allocate a second set of weights.
    """
    torch.nn.Module.__init__(module)
    registries = {"_parameters", "_buffers", "_modules"}
    module.__dict__.update({key: value for key, value in vars(base).items() if key not in registries})
    for name, child in base.named_children():
        module.add_module(name, child)


def has_block_patches(options: Mapping[str, Any]) -> bool:
    """Whether a user's patches have to see the whole of a block's tensors, as the host hands them out."""
    patches, replaced = options.get("patches", {}), options.get("patches_replace", {})
    return any(patches.get(name) for name in _BLOCK_PATCHES) or any(replaced.get(name) for name in _REPLACED)


def layer_norm(x: torch.Tensor, module: torch.nn.LayerNorm, weights: Resident) -> torch.Tensor:
    return functional.layer_norm(x, module.normalized_shape, *weights(module), module.eps)


def add_feed_forward(
    x: torch.Tensor, norm: torch.nn.LayerNorm, feed_forward: FeedForward, weights: Resident, residual: bool
) -> None:
    """x += net(norm(x)), or x = net(norm(x)), in place. x: contiguous [..., C]."""
    tokens = x.view(-1, x.shape[-1])
    gate_in, out = feed_forward.net[0], feed_forward.net[2]
    wide, narrow = weights(gate_in.proj), weights(out)
    size = _FEED_FORWARD_TOKENS if x.device.type == "cpu" else len(tokens)
    for part in tokens.split(size):
        value, gate = functional.linear(layer_norm(part, norm, weights), *wide).chunk(2, dim=-1)
        added = functional.linear(functional.gelu(gate).mul_(value), *narrow)
        part.add_(added) if residual else part.copy_(added)


def _heads(x: torch.Tensor, count: int) -> torch.Tensor:
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def _attend(
    query: torch.Tensor, context: torch.Tensor, attention: CrossAttention, weights: Resident, options: dict[str, Any]
) -> torch.Tensor:
    q = functional.linear(query, *weights(attention.to_q))
    k = functional.linear(context, *weights(attention.to_k))
    v = functional.linear(context, *weights(attention.to_v))
    precision = attention.attn_precision
    out = optimized_attention(q, k, v, attention.heads, attn_precision=precision, transformer_options=options)
    return functional.linear(out, *weights(attention.to_out[0]))


def transformer_block(
    block: BasicTransformerBlock,
    x: torch.Tensor,
    context: torch.Tensor,
    options: dict[str, Any],
    weights: Resident,
) -> None:
    """The host's transformer block, in place, without a user's block patches.

    A context of one token makes cross-attention a constant: softmax over one key is 1 whatever the query, so the
    layer is `to_out(to_v(context))`, exactly. A user's attention override is still called for it.

    Args:
        x: contiguous sequences [N, L, C].
        context: [N, S, D], or [1, S, D] for all.
    """
    if block.ff_in:
        add_feed_forward(x, block.norm_in, block.ff_in, weights, residual=block.is_res)
    normed = layer_norm(x, block.norm1, weights)
    x.add_(_attend(normed, normed, block.attn1, weights, options))
    if block.attn2 is not None:
        if context.shape[1] == 1 and "optimized_attention_override" not in options:
            value = functional.linear(context, *weights(block.attn2.to_v))
            x.add_(functional.linear(value, *weights(block.attn2.to_out[0])))
        else:
            spread = context.expand(x.shape[0], -1, -1)
            x.add_(_attend(layer_norm(x, block.norm2, weights), spread, block.attn2, weights, options))
    add_feed_forward(x, block.norm3, block.ff, weights, residual=block.is_res)


def convolve_pictures(x: torch.Tensor, conv: torch.nn.Conv2d, weights: Resident) -> torch.Tensor:
    """A 3x3 convolution with zeros around the picture, channels last [N, C, H, W], the fastest way for the device."""
    if winograd.pays(x, conv.out_channels, x.shape[2]):
        return winograd.convolve_rows(x, weights.filters(conv, winograd.row_filters), weights(conv)[1])
    return functional.conv2d(x, *weights(conv), padding=1)


def picture_norm(x: torch.Tensor, norm: torch.nn.GroupNorm, weights: Resident) -> torch.Tensor:
    """Group norm of single frames [N, C, H, W]."""
    if x.shape[2] * x.shape[3] == 1:
        # A small model's groups of one value have no spread, and PyTorch's CPU kernel for channels-last tensors
        # multiplies rounding by a thousand there.
        x = x.flatten(1)[..., None, None]
    return functional.group_norm(x, norm.num_groups, *weights(norm), norm.eps)


class Moments:
    """Mean and variance of each clip's channel groups, gathered part by part.

    Parts are merged by Chan et al. (1979), so that nothing is lost to cancellation.
    """

    def __init__(self, groups: int) -> None:
        self._groups = groups
        self._count = 0
        self._mean = self._squares = torch.zeros(())

    def add(self, part: torch.Tensor) -> None:
        """Take in some frames or pixels of all clips, channels last [B, T, P, C]."""
        part = part.float()
        added = part[0, ..., : part.shape[-1] // self._groups].numel()
        # Mean first, then deviations: PyTorch's own var_mean takes seven times as long on a CPU.
        by_channel = part.mean((1, 2), keepdim=True)
        spread = (part - by_channel).square_().sum((1, 2)).unflatten(-1, (self._groups, -1))
        means = by_channel.flatten(1).unflatten(-1, (self._groups, -1))
        mean = means.mean(-1)
        each = added // means.shape[-1]
        squares = spread.sum(-1) + (means - mean[..., None]).square().sum(-1) * each
        total = self._count + added
        step = mean - self._mean.to(mean)
        self._mean = mean - step * (self._count / total)
        self._squares = self._squares.to(mean) + squares + step.square() * (self._count * added / total)
        self._count = total

    def of_channels(self, channels: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and (biased) variance of every channel's group [B, C], float32."""
        each = channels // self._groups
        return self._mean.repeat_interleave(each, 1), (self._squares / self._count).repeat_interleave(each, 1)


def normalize_activate(
    x: torch.Tensor, moments: tuple[torch.Tensor, torch.Tensor], norm: torch.nn.GroupNorm, weights: Resident
) -> torch.Tensor:
    """silu(group_norm(x)) with the moments of its channels. x: [B, T, P, C] -> contiguous [B, T, P, C]."""
    mean, variance = moments
    weight, bias = weights(norm)
    assert bias is not None  # SVD's norms have one
    scale = weight.float() * (variance + norm.eps).rsqrt()
    centred = x.float() - mean[:, None, None]
    out = torch.addcmul(bias.float(), centred, scale[:, None, None], out=centred)
    return functional.silu(out, inplace=True).to(x.dtype).contiguous()
