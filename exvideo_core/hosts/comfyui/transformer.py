"""The extended transformer: frames in chunks for what looks at one frame, rows for what looks along time."""

from __future__ import annotations

from typing import Any

import comfy.model_management
import torch
from comfy.ldm.modules.attention import SpatialVideoTransformer
from torch.nn import functional

from ... import chunks
from ...choices import PositionMode
from ...positions import blended_table
from ...temporal import padded_rows
from .layers import adopt, has_block_patches, linear_into, picture_norm, transformer_block
from .resident import Resident

#: A chunk's widest intermediate, in multiples of its tokens: the feed-forward's two halves of 4 C, and its input.
_WIDTH = 9
#: A linear layer on tokens in any other order copies its weights once a sequence.
_CONTIGUOUS = torch.contiguous_format


class ExtendedVideoTransformer(SpatialVideoTransformer):
    """An SVD transformer whose temporal block reads trained positions through a 3-D convolution.

    It is a subclass because the host dispatches on the class. All submodules are the base's own, under the
    same names; only `positional_conv` is new.

    Args:
        base: the model's transformer.
        conv: the 3x3x3 convolution, without padding.
        table: the extension's positions for it [F, C].
        positions, strength: as in `apply_extension`.
    """

    def __init__(
        self,
        base: SpatialVideoTransformer,
        conv: torch.nn.Conv3d,
        table: torch.Tensor,
        positions: PositionMode,
        strength: float,
    ) -> None:
        adopt(self, base)
        self.positional_conv = conv
        self.position_table = table
        self.position_mode: PositionMode = positions
        self.position_strength = strength

    def forward(
        self,
        x: torch.Tensor,
        context: torch.Tensor | None = None,
        time_context: torch.Tensor | None = None,
        timesteps: int | None = None,
        image_only_indicator: torch.Tensor | None = None,
        transformer_options: dict[str, Any] | None = None,
    ) -> torch.Tensor:
        """The host transformer's contract: x [B*T, C, H, W] and context [B*T, N, D] with T = `timesteps` frames."""
        options: dict[str, Any] = {} if transformer_options is None else transformer_options
        options["activations_shape"] = list(x.shape)
        options["block_index"] = 0
        assert context is not None
        frames = x.shape[0] if timesteps is None else timesteps
        weights = Resident(x)
        tokens = self._spatial(x, context, options, weights)
        clip_context = (context if time_context is None else time_context)[::frames]
        self._temporal(tokens, x, clip_context, frames, image_only_indicator, options, weights)
        return tokens.permute(0, 3, 1, 2)

    def _spatial(
        self, x: torch.Tensor, context: torch.Tensor, options: dict[str, Any], weights: Resident
    ) -> torch.Tensor:
        """Norm, projection and spatial block, frame by frame: [B*T, C, H, W] -> tokens [B*T, H, W, C]."""
        count, channels, height, width = x.shape
        block = self.transformer_blocks[0]
        whole = has_block_patches(options)
        tokens = x.new_empty(count, height, width, channels)
        size = height * width * channels * x.element_size() * _WIDTH
        for start, end in [(0, count)] if whole else chunks.spans(count, size):
            part = x[start:end].contiguous(memory_format=torch.channels_last)
            normed = picture_norm(part, self.norm, weights).permute(0, 2, 3, 1)
            out = tokens[start:end].flatten(1, 2)
            linear_into(out, normed.flatten(1, 2), *self._projection(self.proj_in, weights))
            if whole:
                out.copy_(block(out, context=context, transformer_options=options))
            else:
                transformer_block(block, out, context[start:end], options, weights)
        return tokens

    def _temporal(
        self,
        tokens: torch.Tensor,
        x: torch.Tensor,
        context: torch.Tensor,
        frames: int,
        image_only_indicator: torch.Tensor | None,
        options: dict[str, Any],
        weights: Resident,
    ) -> None:
        """Convolution, temporal block, blend and projection, row by row: `tokens` becomes the layer's output.

        Rows above are needed as they were, so the last one of a chunk is kept until the next has read it.
        """
        _, height, width, channels = tokens.shape
        clips = tokens.unflatten(0, (-1, frames))
        residual = x.permute(0, 2, 3, 1).unflatten(0, (-1, frames))
        block, whole = self.time_stack[0], has_block_patches(options)
        positions = self._positions(frames, x, weights)
        alpha = self.time_mixer.get_alpha(image_only_indicator, x.device).to(x.dtype)
        alpha = alpha.expand(alpha.shape[0], 1, 1).unflatten(0, (-1, frames if alpha.shape[0] > 1 else 1))
        size = len(tokens) * width * channels * x.element_size() * _WIDTH
        above: torch.Tensor | None = None
        for start, end in [(0, height)] if whole else chunks.spans(height, size):
            padded = padded_rows(clips, start, end, above, positions)
            above = clips[:, :, end - 1].clone()
            moving = self._convolve(padded, weights)
            del padded
            shape = moving.shape
            moving = moving.view(-1, frames, channels)
            # One clip's context serves all its sequences as it is.
            alike = len(clips) == 1 and not whole
            spread = context if alike else context.repeat_interleave((end - start) * width, dim=0)
            if whole:
                moving = block(moving, context=spread, transformer_options=options)
            else:
                transformer_block(block, moving, spread, options, weights)
            moving = moving.view(shape).permute(0, 3, 1, 2, 4)
            rows = clips[:, :, start:end]
            mixed = torch.lerp(moving, rows, alpha.unsqueeze(-1), out=torch.empty_like(rows, memory_format=_CONTIGUOUS))
            projected = functional.linear(mixed, *self._projection(self.proj_out, weights))
            torch.add(projected, residual[:, :, start:end], out=rows)

    def _convolve(self, padded: torch.Tensor, weights: Resident) -> torch.Tensor:
        """The 3-D convolution of padded rows, in the order in which temporal attention reads: [B, rows, W, T, C]."""
        weight, bias = weights(self.positional_conv)
        weight = weight.contiguous(memory_format=torch.channels_last_3d)
        # The host's own method: it goes around what is wrong with some versions of cuDNN.
        convolved = self.positional_conv._conv_forward(padded.permute(0, 4, 1, 2, 3), weight, None)
        by_pixel = convolved.permute(0, 3, 4, 2, 1)
        return torch.add(by_pixel, bias, out=torch.empty_like(by_pixel, memory_format=_CONTIGUOUS))

    def _positions(self, frames: int, like: torch.Tensor, weights: Resident) -> torch.Tensor:
        table = blended_table(self.position_table, frames, self.position_mode, self.position_strength)
        table = comfy.model_management.cast_to_device(table, like.device, like.dtype)
        first, _, second = self.time_pos_embed
        return functional.linear(functional.silu(functional.linear(table, *weights(first))), *weights(second))

    def _projection(self, layer: torch.nn.Module, weights: Resident) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The projections in and out are linear layers, or 1x1 convolutions, which are the same on tokens."""
        weight, bias = weights(layer)
        return weight.flatten(1), bias
