"""SVD's temporal VAE decoder with bounded memory, on as many frames at once as it is told."""

from __future__ import annotations

import logging
import math

import comfy.model_management
import comfy.sd
import torch
from comfy.ldm.modules.temporal_ae import VideoDecoder, VideoResBlock
from torch.nn import functional

from ...video.images import check_latents
from ..low_memory import budget as chunks
from ..low_memory.cast_weights import Resident
from ..low_memory.frame_maps import FrameMaps
from ..low_memory.host_buffers import buffers_for
from ..low_memory.res_blocks import Chunked, Enlarged, add_time_residual, frames_residual
from ..low_memory.skip_connections import HostBuffers
from ..low_memory.transformer_block import picture_norm

#: The same however much memory is free: kernels round differently for chunks of another size.
_BUDGET = chunks.Budget(64 * chunks.MEGABYTE)
#: Where the card refuses that much.
_SMALL = chunks.Budget(8 * chunks.MEGABYTE)
#: What decoding may take of a card. A longer chunk's feature maps wait in host memory for their turn: at 1024x1024 the
#: last level's of 24 frames are 6 GiB.
_SHARE = 3 / 8


def decode_chunk(vae: comfy.sd.VAE, latents: torch.Tensor, buffers: HostBuffers | None = None) -> torch.Tensor:
    """Decode frames together, as SVD's decoder was made to, whatever memory is free.

    The host's own `VAE.decode` cuts them by free memory, and the decoder sees only what it is given together. Other
    VAEs than SVD's are left to the host.

    Args:
        latents: [T, 4, H, W].
        buffers: for what has no room on the device (default: new ones); to pin memory takes time, so that the chunks of
            a clip share theirs.

    Returns:
        0..1 [T, 8 H, 8 W, 3] on the host's device for results.

    Raises:
        torch.OutOfMemoryError: the card has no room even for a few frames at once.
    """
    decoder = getattr(vae.first_stage_model, "decoder", None)
    if not isinstance(decoder, VideoDecoder) or decoder.time_mode != "conv-only":
        return vae.decode(latents)
    check_latents(latents, 4)
    if buffers is None:
        buffers = buffers_for(vae.device)
    try:
        return _decode_within(vae, decoder, latents, _BUDGET, _most(vae.device), buffers)
    except comfy.model_management.OOM_EXCEPTION:
        logging.warning("Decoding %d frames at once ran out of memory: trying again in smaller pieces.", len(latents))
    comfy.model_management.free_memory(1e30, vae.device)
    comfy.model_management.soft_empty_cache()
    try:
        return _decode_within(vae, decoder, latents, _SMALL, 0.0, buffers)
    except comfy.model_management.OOM_EXCEPTION as error:
        height, width = (8 * size for size in latents.shape[2:])
        raise torch.OutOfMemoryError(
            f"The card has no memory to decode {len(latents)} frames of {width}x{height}. The sampled latents are "
            "kept: lower chunk_frames of the decoding node, or close other programs that use the card, and queue the "
            f"workflow again. ({error})"
        ) from error


def _most(device: torch.device) -> float:
    """Bytes that decoding may take of a device."""
    if comfy.model_management.is_device_cpu(device):
        return math.inf
    return comfy.model_management.get_total_memory(device) * _SHARE


def _decode_within(
    vae: comfy.sd.VAE,
    decoder: VideoDecoder,
    latents: torch.Tensor,
    budget: chunks.Budget,
    most: float,
    buffers: HostBuffers,
) -> torch.Tensor:
    """Decode with intermediates of `budget`, and `most` bytes on the device altogether."""
    itemsize = vae.vae_dtype.itemsize
    frames, _, height, width = latents.shape
    # At the widest, the first block of the last level: an input of half the size and an output, and of each frame that
    # is computed the input enlarged, convolved and normalised.
    last = decoder.up[0].block[0]
    each = 64 * height * width * itemsize
    working = 5 * max(each * last.in_channels, budget.chunk_bytes)
    maps = frames * each * (last.in_channels / 4 + last.out_channels)
    needed = working + min(maps, max(most - working, 0.0))
    comfy.model_management.load_models_gpu([vae.patcher], memory_required=needed)
    buffers.begin()
    samples = latents.to(device=vae.device, dtype=vae.vae_dtype)
    with torch.no_grad(), chunks.use(budget):
        pixels = vae.process_output(_decode(decoder, samples, most - working, buffers).to(vae.output_device).float())
    return pixels.movedim(1, -1)


def _decode(decoder: VideoDecoder, z: torch.Tensor, most: float, buffers: HostBuffers) -> torch.Tensor:
    """`Decoder.forward` of the host, for a decoder of `VideoResBlock`s. z: [T, 4, H, W] -> [T, 3, 8 H, 8 W]."""
    first = Resident(z).conv2d(decoder.conv_in, z)
    x = FrameMaps.of(first.contiguous(memory_format=torch.channels_last), len(z))
    del first
    x = _block(decoder.mid.block_1, x, most, buffers)
    for frame in range(len(z)):
        picture = x.frames(frame, frame + 1)
        picture.copy_(decoder.mid.attn_1(picture.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        x.store_frames(frame, frame + 1, picture)
    x = _block(decoder.mid.block_2, x, most, buffers)
    for level in reversed(range(decoder.num_resolutions)):
        for number, block in enumerate(decoder.up[level].block):
            enlarged = number == 0 and level + 1 < decoder.num_resolutions
            conv = decoder.up[level + 1].upsample.conv if enlarged else None
            x = _block(block, x, most, buffers, conv)
    return _out(decoder, x)


def _block(
    block: VideoResBlock, x: FrameMaps, most: float, buffers: HostBuffers, enlarging: torch.nn.Conv2d | None = None
) -> FrameMaps:
    """A block, in place where its channels allow it; on pictures twice the size behind `enlarging`."""
    weights = Resident(x)
    shortcut = getattr(block, "nin_shortcut", None)
    count, _, height, width = x.shape
    given: Chunked = x
    if enlarging is not None:
        height, width = 2 * height, 2 * width
        given = Enlarged(x, enlarging, (height, width), weights)
    out = x
    if enlarging is not None or shortcut is not None:
        shape = (count, block.out_channels, height, width)
        out = FrameMaps.empty(shape, x.dtype, x.device, most - x.device_bytes, buffers)
    halves = (block.norm1, block.conv1), (block.norm2, block.conv2)
    frames_residual(given, *halves, shortcut, None, weights, out)
    del x, given  # the caller's reference goes as well once it has our result
    share = block.get_alpha(1).to(out.device, out.dtype)
    add_time_residual(out, block.time_stack, None, share, weights, keep=False)
    return out


def _out(decoder: VideoDecoder, x: FrameMaps) -> torch.Tensor:
    weights = Resident(x)
    norm, conv = decoder.norm_out, decoder.conv_out
    count, channels, height, width = x.shape
    out = torch.empty(count, conv.out_channels, height, width, dtype=x.dtype, device=x.device)
    spans = chunks.spans(count, height * width * channels * x.dtype.itemsize * 2)
    for (start, end), part in zip(spans, x.chunks(spans), strict=True):
        normed = picture_norm(part, norm, weights)
        out[start:end] = functional.conv2d(functional.silu(normed, inplace=True), *weights(conv), padding=1)
    weight, bias = weights(conv.time_mix_conv)
    mixed = functional.conv3d(out.movedim(1, 0)[None], weight, bias, padding=conv.time_mix_conv.padding)
    return mixed[0].movedim(0, 1)
