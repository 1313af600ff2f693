"""The extended transformer: frames in chunks for what looks at one frame, rows for what looks along time."""

from __future__ import annotations

from typing import Any

import comfy.model_management
import torch
from comfy.ldm.modules.attention import SpatialVideoTransformer
from torch.nn import functional

from ...choices import PositionMode
from ...method.convolution import padded_rows, positional_convolution
from ...method.positions import blended_table
from ..low_memory import budget as chunks
from ..low_memory.attention_patches import Reach, reach_in
from ..low_memory.cast_weights import Resident
from ..low_memory.transformer_block import adopt, picture_norm, transformer_block
from .merges import refuse_to_save

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
        name: the extension's, for messages.
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
        adopt(self, base)
        self.positional_conv = conv
        self.position_table = table
        self.position_mode: PositionMode = positions
        self.position_strength = strength
        self.extension_name = name

    def state_dict(self, *given: Any, **named: Any) -> dict[str, Any]:  # noqa: ANN401 - PyTorch's
        refuse_to_save(self.extension_name)
        return super().state_dict(*given, **named)

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
        if torch.is_grad_enabled():
            return self._differentiable(x, context, time_context, frames, image_only_indicator, options)
        weights = Resident(x)
        tokens = self._spatial(x, context, frames, options, weights)
        clip_context = (context if time_context is None else time_context)[::frames]
        self._temporal(tokens, x, clip_context, frames, image_only_indicator, options, weights)
        return tokens.permute(0, 3, 1, 2)

    def _spatial(
        self, x: torch.Tensor, context: torch.Tensor, frames: int, options: dict[str, Any], weights: Resident
    ) -> torch.Tensor:
        """Norm, projection and spatial block, frame by frame: [B*T, C, H, W] -> tokens [B*T, H, W, C]."""
        count, channels, height, width = x.shape
        block, reach = self.transformer_blocks[0], reach_in(options)
        tokens = x.new_empty(count, height, width, channels)
        size = height * width * channels * x.element_size() * _WIDTH
        for part in self._parts(count, frames, size, reach):
            normed = picture_norm(x[part].contiguous(memory_format=torch.channels_last), self.norm, weights)
            out = tokens[part].flatten(1, 2)  # a view where the part is a slice, which the block then works in
            pixels = normed.permute(0, 2, 3, 1)
            if self.use_linear:
                weights.linear_into(out, self.proj_in, pixels.flatten(1, 2))
            else:
                out.copy_(self._project(self.proj_in, pixels, weights).flatten(1, 2))
            if reach is Reach.NOTHING:
                transformer_block(block, out, context[part], options, weights)
            else:
                changed = block(out, context=context[part], transformer_options=options)
                tokens[part] = changed.unflatten(1, (height, width))
        return tokens

    def _parts(self, count: int, frames: int, size: int, reach: Reach) -> list[Any]:
        """Indices of the frames that a spatial block is given at once, of a batch of B*T.

        Args:
            size: bytes of a frame's widest intermediate.
        """
        if reach is Reach.ALL:
            return [slice(None)]
        if reach is Reach.NOTHING:
            return [slice(start, end) for start, end in chunks.spans(count, size)]
        by_clip = torch.arange(count).unflatten(0, (-1, frames))
        return [by_clip[:, start:end].flatten() for start, end in chunks.spans(frames, len(by_clip) * size)]

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
        block, reach = self.time_stack[0], reach_in(options)
        positions = self._positions(frames, x, weights)
        alpha = self.time_mixer.get_alpha(image_only_indicator, x.device).to(x.dtype)
        alpha = alpha.expand(alpha.shape[0], 1, 1).unflatten(0, (-1, frames if alpha.shape[0] > 1 else 1))
        size = len(tokens) * width * channels * x.element_size() * _WIDTH
        above: torch.Tensor | None = None
        # Every part holds all conditions.
        for start, end in [(0, height)] if reach is Reach.ALL else chunks.spans(height, size):
            padded = padded_rows(clips, start, end, above, positions)
            above = clips[:, :, end - 1].clone()
            moving = self._convolve(padded, weights)
            del padded
            shape = moving.shape
            moving = moving.view(-1, frames, channels)
            # One clip's context serves all its sequences as it is.
            alike = len(clips) == 1 and reach is Reach.NOTHING
            spread = context if alike else context.repeat_interleave((end - start) * width, dim=0)
            if reach is not Reach.NOTHING:
                moving = block(moving, context=spread, transformer_options=options)
            else:
                transformer_block(block, moving, spread, options, weights)
            moving = moving.view(shape).permute(0, 3, 1, 2, 4)
            rows = clips[:, :, start:end]
            mixed = torch.lerp(moving, rows, alpha.unsqueeze(-1), out=torch.empty_like(rows, memory_format=_CONTIGUOUS))
            torch.add(self._project(self.proj_out, mixed, weights), residual[:, :, start:end], out=rows)

    def _convolve(self, padded: torch.Tensor, weights: Resident) -> torch.Tensor:
        """The 3-D convolution of padded rows, in the order in which temporal attention reads: [B, rows, W, T, C]."""
        conv, by_channel = self.positional_conv, padded.permute(0, 4, 1, 2, 3)
        if not weights.owns(conv):
            return conv(by_channel).permute(0, 3, 4, 2, 1).contiguous()
        weight, bias = weights(conv)
        weight = weight.contiguous(memory_format=torch.channels_last_3d)
        # The host's own method: it goes around what is wrong with some versions of cuDNN.
        by_pixel = conv._conv_forward(by_channel, weight, None).permute(0, 3, 4, 2, 1)
        return torch.add(by_pixel, bias, out=torch.empty_like(by_pixel, memory_format=_CONTIGUOUS))

    def _positions(self, frames: int, like: torch.Tensor, weights: Resident) -> torch.Tensor:
        first, _, second = self.time_pos_embed
        return weights.linear(second, functional.silu(weights.linear(first, self._table(frames, like))))

    def _table(self, frames: int, like: torch.Tensor) -> torch.Tensor:
        table = blended_table(self.position_table, frames, self.position_mode, self.position_strength)
        return comfy.model_management.cast_to_device(table, like.device, like.dtype)

    def _project(self, layer: torch.nn.Module, pixels: torch.Tensor, weights: Resident) -> torch.Tensor:
        """A projection of pixels [..., H, W, C]: a linear layer, or a 1x1 convolution, which is the same on them."""
        if weights.owns(layer):
            weight, bias = weights(layer)
            return functional.linear(pixels, weight.flatten(1), bias)
        if self.use_linear:
            return layer(pixels)
        pictures = pixels.flatten(0, -4).permute(0, 3, 1, 2)
        return layer(pictures).permute(0, 2, 3, 1).reshape(pixels.shape)

    def _differentiable(
        self,
        x: torch.Tensor,
        context: torch.Tensor,
        time_context: torch.Tensor | None,
        frames: int,
        image_only_indicator: torch.Tensor | None,
        options: dict[str, Any],
    ) -> torch.Tensor:
        """The same at once, of operations that have gradients, as training nodes of the host need."""
        height, width = x.shape[2:]
        tokens = self._as_tokens(self.norm(x))
        tokens = self.transformer_blocks[0](tokens, context=context, transformer_options=options)
        first, activation, second = self.time_pos_embed
        positions = second(activation(first(self._table(frames, x))))
        moving = positional_convolution(tokens, positions, self.positional_conv, height, width)
        clip_context = (context if time_context is None else time_context)[::frames]
        spread = clip_context.repeat_interleave(height * width, dim=0)
        moving = self.time_stack[0](moving, context=spread, transformer_options=options)
        moving = moving.unflatten(0, (-1, height * width)).transpose(1, 2).flatten(0, 1)
        mixed = self.time_mixer(x_spatial=tokens, x_temporal=moving, image_only_indicator=image_only_indicator)
        if self.use_linear:
            return x + self.proj_out(mixed).transpose(1, 2).unflatten(2, (height, width))
        return x + self.proj_out(mixed.transpose(1, 2).unflatten(2, (height, width)))

    def _as_tokens(self, normed: torch.Tensor) -> torch.Tensor:
        if self.use_linear:
            return self.proj_in(normed.flatten(2).transpose(1, 2))
        return self.proj_in(normed).flatten(2).transpose(1, 2)
