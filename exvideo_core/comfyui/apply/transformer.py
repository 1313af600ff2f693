"""The extended transformer: its spatial half in chunks of frames, its temporal half in chunks of rows."""

from __future__ import annotations

from typing import Any

import comfy.model_management
import torch
from comfy.ldm.modules.attention import SpatialVideoTransformer
from torch.nn import functional

from ...choices import PositionMode
from ...method.convolution import padded_rows, positional_convolution
from ...method.positions import blended_table
from ..low_memory.attention_patches import PatchScope, scope_at_block
from ..low_memory.budget import chunk_ranges
from ..low_memory.cast_weights import CastWeights
from ..low_memory.group_norm import frame_group_norm
from ..low_memory.transformer_block import transformer_block
from ..model import share_submodules
from .merges import refuse_to_save

#: Size of a chunk's widest intermediate in multiples of its tokens: the feed-forward's input and two halves of 4 C.
_WIDTH = 9
#: On tokens in any other memory layout, a linear layer copies its weights once per sequence.
_CONTIGUOUS = torch.contiguous_format


class ExtendedVideoTransformer(SpatialVideoTransformer):
    """An SVD transformer whose temporal block reads trained positions through a 3-D convolution.

    A subclass, because ComfyUI dispatches on the class. All submodules are the base's own, under the same names; only
    `positional_conv` is new.

    Args:
        base: the model's transformer.
        conv: the 3x3x3 convolution, without padding.
        table: the extension's trained positions [F, C].
        positions, strength: as in `apply_extension`.
        name: the extension's name, for error messages.
    """

    def __init__(
        self,
        base: SpatialVideoTransformer,
        conv: torch.nn.Conv3d,
        table: torch.Tensor,
        positions: PositionMode,
        strength: float,
        name: str,
    ) -> None:
        share_submodules(self, base)
        self.positional_conv = conv
        self.position_table = table
        self.position_mode: PositionMode = positions
        self.position_strength = strength
        self.extension_name = name

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # noqa: ANN401 - PyTorch's
        refuse_to_save(self.extension_name)
        return super().state_dict(*args, **kwargs)

    def forward(
        self,
        x: torch.Tensor,
        context: torch.Tensor | None = None,
        time_context: torch.Tensor | None = None,
        timesteps: int | None = None,
        image_only_indicator: torch.Tensor | None = None,
        transformer_options: dict[str, Any] | None = None,
    ) -> torch.Tensor:
        """As ComfyUI's `SpatialVideoTransformer`: x [B*T, C, H, W] and context [B*T, N, D], with T = `timesteps`."""
        options: dict[str, Any] = {} if transformer_options is None else transformer_options
        options["activations_shape"] = list(x.shape)
        options["block_index"] = 0
        assert context is not None
        frames = x.shape[0] if timesteps is None else timesteps
        if torch.is_grad_enabled():
            return self._differentiable(x, context, time_context, frames, image_only_indicator, options)
        weights = CastWeights(x)
        tokens = self._spatial(x, context, frames, options, weights)
        video_context = (context if time_context is None else time_context)[::frames]
        self._temporal(tokens, x, video_context, frames, image_only_indicator, options, weights)
        return tokens.permute(0, 3, 1, 2)

    def _spatial(
        self, x: torch.Tensor, context: torch.Tensor, frames: int, options: dict[str, Any], weights: CastWeights
    ) -> torch.Tensor:
        """Norm, projection and spatial block, frame by frame: [B*T, C, H, W] -> tokens [B*T, H, W, C]."""
        count, channels, height, width = x.shape
        block, scope = self.transformer_blocks[0], scope_at_block(options)
        tokens = x.new_empty(count, height, width, channels)
        size = height * width * channels * x.element_size() * _WIDTH
        for part in self._frame_chunks(count, frames, size, scope):
            normed = frame_group_norm(x[part].contiguous(memory_format=torch.channels_last), self.norm, weights)
            out = tokens[part].flatten(1, 2)  # a view if `part` is a slice, updated in place
            pixels = normed.permute(0, 2, 3, 1)
            if self.use_linear:
                weights.linear_into(out, self.proj_in, pixels.flatten(1, 2))
            else:
                out.copy_(self._project(self.proj_in, pixels, weights).flatten(1, 2))
            if scope is PatchScope.NONE:
                transformer_block(block, out, context[part], options, weights)
            else:
                result = block(out, context=context[part], transformer_options=options)
                tokens[part] = result.unflatten(1, (height, width))
        return tokens

    def _frame_chunks(self, count: int, frames: int, size: int, scope: PatchScope) -> list[Any]:
        """Indices of the frames of each chunk, of a batch of B*T.

        Args:
            size: bytes of one frame's widest intermediate.
            scope: of the patches; unless it is NONE, every chunk holds all conditions.
        """
        if scope is PatchScope.WHOLE:
            return [slice(None)]
        if scope is PatchScope.NONE:
            return [slice(start, end) for start, end in chunk_ranges(count, size)]
        by_video = torch.arange(count).unflatten(0, (-1, frames))
        return [by_video[:, start:end].flatten() for start, end in chunk_ranges(frames, len(by_video) * size)]

    def _temporal(
        self,
        tokens: torch.Tensor,
        x: torch.Tensor,
        context: torch.Tensor,
        frames: int,
        image_only_indicator: torch.Tensor | None,
        options: dict[str, Any],
        weights: CastWeights,
    ) -> None:
        """Convolution, temporal block, blend and projection, in chunks of rows: `tokens` becomes the layer's output.

        The convolution reads the row above as it was, so the last row of a chunk is kept for the next one.
        """
        _, height, width, channels = tokens.shape
        videos = tokens.unflatten(0, (-1, frames))
        residual = x.permute(0, 2, 3, 1).unflatten(0, (-1, frames))
        block, scope = self.time_stack[0], scope_at_block(options)
        positions = self._positions(frames, x, weights)
        alpha = self.time_mixer.get_alpha(image_only_indicator, x.device).to(x.dtype)
        alpha = alpha.expand(alpha.shape[0], 1, 1).unflatten(0, (-1, frames if alpha.shape[0] > 1 else 1))
        size = len(tokens) * width * channels * x.element_size() * _WIDTH
        above: torch.Tensor | None = None
        # Every chunk holds all conditions.
        for start, end in [(0, height)] if scope is PatchScope.WHOLE else chunk_ranges(height, size):
            padded = padded_rows(videos, start, end, above, positions)
            above = videos[:, :, end - 1].clone()
            temporal = self._convolve(padded, weights)
            del padded
            shape = temporal.shape
            temporal = temporal.view(-1, frames, channels)
            # With one condition, all sequences share its context.
            shared = len(videos) == 1 and scope is PatchScope.NONE
            expanded = context if shared else context.repeat_interleave((end - start) * width, dim=0)
            if scope is not PatchScope.NONE:
                temporal = block(temporal, context=expanded, transformer_options=options)
            else:
                transformer_block(block, temporal, expanded, options, weights)
            temporal = temporal.view(shape).permute(0, 3, 1, 2, 4)
            rows = videos[:, :, start:end]
            mixed = torch.lerp(
                temporal, rows, alpha.unsqueeze(-1), out=torch.empty_like(rows, memory_format=_CONTIGUOUS)
            )
            torch.add(self._project(self.proj_out, mixed, weights), residual[:, :, start:end], out=rows)

    def _convolve(self, padded: torch.Tensor, weights: CastWeights) -> torch.Tensor:
        """The 3-D convolution of padded rows, in the memory layout of temporal attention: [B, rows, W, T, C]."""
        conv, by_channel = self.positional_conv, padded.permute(0, 4, 1, 2, 3)
        if not weights.is_plain(conv):
            return conv(by_channel).permute(0, 3, 4, 2, 1).contiguous()
        weight, bias = weights(conv)
        weight = weight.contiguous(memory_format=torch.channels_last_3d)
        # ComfyUI's own method, which works around bugs of some cuDNN versions.
        by_pixel = conv._conv_forward(by_channel, weight, None).permute(0, 3, 4, 2, 1)
        return torch.add(by_pixel, bias, out=torch.empty_like(by_pixel, memory_format=_CONTIGUOUS))

    def _positions(self, frames: int, like: torch.Tensor, weights: CastWeights) -> torch.Tensor:
        first, _, second = self.time_pos_embed
        return weights.linear(second, functional.silu(weights.linear(first, self._table(frames, like))))

    def _table(self, frames: int, like: torch.Tensor) -> torch.Tensor:
        table = blended_table(self.position_table, frames, self.position_mode, self.position_strength)
        return comfy.model_management.cast_to_device(table, like.device, like.dtype)

    def _project(self, layer: torch.nn.Module, pixels: torch.Tensor, weights: CastWeights) -> torch.Tensor:
        """Project pixels [..., H, W, C] by a linear layer or by a 1x1 convolution, which is equivalent."""
        if weights.is_plain(layer):
            weight, bias = weights(layer)
            return functional.linear(pixels, weight.flatten(1), bias)
        if self.use_linear:
            return layer(pixels)
        images = pixels.flatten(0, -4).permute(0, 3, 1, 2)
        return layer(images).permute(0, 2, 3, 1).reshape(pixels.shape)

    def _differentiable(
        self,
        x: torch.Tensor,
        context: torch.Tensor,
        time_context: torch.Tensor | None,
        frames: int,
        image_only_indicator: torch.Tensor | None,
        options: dict[str, Any],
    ) -> torch.Tensor:
        """The same without chunks, by differentiable operations, for ComfyUI's training nodes."""
        height, width = x.shape[2:]
        tokens = self._as_tokens(self.norm(x))
        tokens = self.transformer_blocks[0](tokens, context=context, transformer_options=options)
        first, activation, second = self.time_pos_embed
        positions = second(activation(first(self._table(frames, x))))
        temporal = positional_convolution(tokens, positions, self.positional_conv, height, width)
        video_context = (context if time_context is None else time_context)[::frames]
        expanded = video_context.repeat_interleave(height * width, dim=0)
        temporal = self.time_stack[0](temporal, context=expanded, transformer_options=options)
        temporal = temporal.unflatten(0, (-1, height * width)).transpose(1, 2).flatten(0, 1)
        mixed = self.time_mixer(x_spatial=tokens, x_temporal=temporal, image_only_indicator=image_only_indicator)
        if self.use_linear:
            return x + self.proj_out(mixed).transpose(1, 2).unflatten(2, (height, width))
        return x + self.proj_out(mixed.transpose(1, 2).unflatten(2, (height, width)))

    def _as_tokens(self, normed: torch.Tensor) -> torch.Tensor:
        if self.use_linear:
            return self.proj_in(normed.flatten(2).transpose(1, 2))
        return self.proj_in(normed).flatten(2).transpose(1, 2)
