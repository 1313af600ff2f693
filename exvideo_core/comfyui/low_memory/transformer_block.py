"""The layers of SVD's blocks on chunks of tokens, in place wherever that is exact."""

from __future__ import annotations

from typing import Any

import torch
from comfy.ldm.modules import attention as host_attention
from comfy.ldm.modules.attention import BasicTransformerBlock, CrossAttention, FeedForward
from torch.nn import functional

from .cast_weights import Resident
from .overrides import is_sum_of_its_parts

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


def add_feed_forward(
    x: torch.Tensor, norm: torch.nn.LayerNorm, feed_forward: FeedForward, weights: Resident, residual: bool
) -> None:
    """x += net(norm(x)), or x = net(norm(x)), in place. x: contiguous [..., C]."""
    tokens = x.view(-1, x.shape[-1])
    if not is_sum_of_its_parts(feed_forward):
        changed = feed_forward(weights.layer_norm(norm, x))
        x.copy_(x + changed if residual else changed)
        return
    gated, out = feed_forward.net[0], feed_forward.net[2]
    fused = is_sum_of_its_parts(gated) and weights.owns(gated.proj)
    if fused:
        # Two products of half the width: each result lies in one piece, which pointwise kernels read twice as fast.
        weight, bias = weights(gated.proj)
        value_weight, gate_weight = weight.chunk(2)
        value_bias, gate_bias = (None, None) if bias is None else bias.chunk(2)
    size = _FEED_FORWARD_TOKENS if x.device.type == "cpu" else len(tokens)
    for part in tokens.split(size):
        normed = weights.layer_norm(norm, part)
        if fused:
            hidden = functional.gelu(functional.linear(normed, gate_weight, gate_bias))
            hidden.mul_(functional.linear(normed, value_weight, value_bias))
        else:
            hidden = gated(normed)
        if residual:
            part.add_(weights.linear(out, hidden))
        else:
            weights.linear_into(part, out, hidden)


def _attend(
    query: torch.Tensor,
    context: torch.Tensor,
    attention: CrossAttention,
    weights: Resident,
    options: dict[str, Any],
    shift: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention, and `shift` [C] added to its result."""
    if not is_sum_of_its_parts(attention):
        out = attention(query, context=context, transformer_options=options)
        return out if shift is None else out + shift
    q = weights.linear(attention.to_q, query)
    k = weights.linear(attention.to_k, context)
    v = weights.linear(attention.to_v, context)
    precision = attention.attn_precision
    # Looked up at every call: other packs put their own kernels there.
    out = host_attention.optimized_attention(
        q, k, v, attention.heads, attn_precision=precision, transformer_options=options
    )
    return weights.linear(attention.to_out[0], out, shift)


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
    if not is_sum_of_its_parts(block):
        x.copy_(block(x, context=context.expand(x.shape[0], -1, -1), transformer_options=options))
        return
    if block.ff_in:
        add_feed_forward(x, block.norm_in, block.ff_in, weights, residual=block.is_res)
    crossed: torch.Tensor | None = None
    cross = block.attn2
    if (
        cross is not None
        and context.shape[1] == 1
        and "optimized_attention_override" not in options
        and is_sum_of_its_parts(cross)
    ):
        crossed = weights.linear(cross.to_out[0], weights.linear(cross.to_v, context))
    normed = weights.layer_norm(block.norm1, x)
    alike = crossed is not None and len(crossed) == 1
    x.add_(_attend(normed, normed, block.attn1, weights, options, crossed.flatten() if alike else None))
    if crossed is not None and not alike:
        x.add_(crossed)
    elif cross is not None and crossed is None:
        spread = context.expand(x.shape[0], -1, -1)
        x.add_(_attend(weights.layer_norm(block.norm2, x), spread, cross, weights, options))
    add_feed_forward(x, block.norm3, block.ff, weights, residual=block.is_res)


def picture_norm(x: torch.Tensor, norm: torch.nn.GroupNorm, weights: Resident) -> torch.Tensor:
    """Group norm of single frames, channels last [N, C, H, W]."""
    if not weights.owns(norm):
        return norm(x)
    if x.dtype == torch.float32:
        if x.shape[2] * x.shape[3] == 1:
            # A small model's groups of one value have no spread, and PyTorch's CPU kernel for channels-last tensors
            # multiplies rounding by a thousand there.
            x = x.flatten(1)[..., None, None]
        return functional.group_norm(x, norm.num_groups, *weights(norm), norm.eps)
    # PyTorch's kernel for GPUs would copy the pictures to channels first, and the convolution behind it back.
    pixels = x.permute(0, 2, 3, 1)
    moments = Moments(norm.num_groups)
    moments.add(pixels)
    return normalized(pixels, moments, norm, weights).permute(0, 3, 1, 2)


class Moments:
    """Mean and variance of each clip's channel groups, gathered part by part.

    Parts are merged by Chan et al. (1979), so that nothing is lost to cancellation.
    """

    def __init__(self, groups: int) -> None:
        self._groups = groups
        self._count = 0
        self._mean = self._squares = torch.zeros(())  # of the first part, once it is there

    def add(self, part: torch.Tensor) -> None:
        """Take in a part of each of B clips or pictures, channels last [B, T, P, C]."""
        each = part.shape[1] * part.shape[2]
        means = part.mean((1, 2), dtype=torch.float32).unflatten(-1, (self._groups, -1))
        mean = means.mean(-1)
        added = each * means.shape[-1]
        if part.dtype == torch.float32:
            # Mean first, then deviations: PyTorch's own var_mean takes seven times as long on a CPU.
            spread = (part - means.flatten(1)[:, None, None]).square_().sum((1, 2))
            between = (means - mean[..., None]).square().sum(-1) * each
            squares = spread.unflatten(-1, (self._groups, -1)).sum(-1) + between
        else:
            # What float32 loses in the difference is far below half precision, and the part is never copied.
            norms = torch.linalg.vector_norm(part, 2, (1, 2), dtype=torch.float32).square_()
            squares = norms.unflatten(-1, (self._groups, -1)).sum(-1)
            squares = squares.addcmul_(mean, mean, value=-added).clamp_(min=0.0)
        if self._count == 0:
            self._mean, self._squares, self._count = mean, squares, added
            return
        total = self._count + added
        step = mean - self._mean
        self._mean = mean - step * (self._count / total)
        self._squares = self._squares + squares + step.square() * (self._count * added / total)
        self._count = total

    def of_groups(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and (biased) variance of every group [B, G, 1], float32."""
        return self._mean[..., None], (self._squares / self._count)[..., None]


def normalized(x: torch.Tensor, moments: Moments, norm: torch.nn.GroupNorm, weights: Resident) -> torch.Tensor:
    """Group norm with given moments, computed in float32 and rounded once: [B, T, P, C] -> contiguous [B, T, P, C]."""
    mean, variance = moments.of_groups()
    weight, bias = (value.float().unflatten(0, (norm.num_groups, -1)) for value in _affine(weights(norm)))
    scale = (variance + norm.eps).rsqrt_() * weight
    shift = torch.addcmul(bias, mean, scale, value=-1)
    scale, shift = (value.flatten(1)[:, None, None] for value in (scale, shift))
    return torch.addcmul(shift, x, scale, out=torch.empty(x.shape, dtype=x.dtype, device=x.device))


def _affine(weights: tuple[torch.Tensor, torch.Tensor | None]) -> tuple[torch.Tensor, torch.Tensor]:
    weight, bias = weights
    assert bias is not None  # SVD's norms have one
    return weight, bias
