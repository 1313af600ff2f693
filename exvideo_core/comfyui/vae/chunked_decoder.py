"""SVD's temporal VAE decoder with bounded memory, on as many frames at once as requested."""

from __future__ import annotations

import logging
import math

import comfy.model_management
import comfy.sd
import torch
from comfy.ldm.modules.temporal_ae import VideoDecoder, VideoResBlock
from torch.nn import functional

from ...video.latents import check_latents
from ..low_memory.budget import MEGABYTE, chunk_ranges, limit_chunks
from ..low_memory.cast_weights import CastWeights
from ..low_memory.frame_maps import FrameMaps
from ..low_memory.group_norm import frame_group_norm
from ..low_memory.host_buffers import HostBuffers, host_buffers
from ..low_memory.res_blocks import FrameReader, UpsampledFrames, add_spatial_residual, add_temporal_residual

#: The same however much memory is free: kernels round differently for chunks of another size.
_CHUNK_BYTES = 64 * MEGABYTE
#: If the card runs out of memory with the above.
_SMALL_CHUNK_BYTES = 8 * MEGABYTE
#: Share of a card that decoding may use. Feature maps of longer segments are offloaded: at 1024x1024, the last level's
#: are 6 GiB for 24 frames.
_MAX_SHARE = 3 / 8


def decode_segment(vae: comfy.sd.VAE, latents: torch.Tensor, buffers: HostBuffers | None = None) -> torch.Tensor:
    """Decode frames together, as SVD's decoder was trained to, whatever memory is free.

    ComfyUI's own `VAE.decode` splits them by free memory, and the decoder only sees what it is given together. VAEs
    other than SVD's are left to ComfyUI.

    Args:
        latents: [T, 4, H, W].
        buffers: for what has no room on the device (default: new ones). Pinning memory takes time, so the segments of a
            video share their buffers.

    Returns:
        [T, 8 H, 8 W, 3] in 0..1, on ComfyUI's device for results.

    Raises:
        torch.OutOfMemoryError: the card has no room even for a few frames at once.
    """
    decoder = getattr(vae.first_stage_model, "decoder", None)
    if not isinstance(decoder, VideoDecoder) or decoder.time_mode != "conv-only":
        return vae.decode(latents)
    check_latents(latents, 4)
    if buffers is None:
        buffers = host_buffers(vae.device)
    try:
        return _decode_in_chunks(vae, decoder, latents, _CHUNK_BYTES, _max_bytes(vae.device), buffers)
    except comfy.model_management.OOM_EXCEPTION:
        logging.warning("Decoding %d frames at once ran out of memory: retrying in smaller chunks.", len(latents))
    comfy.model_management.free_memory(1e30, vae.device)
    comfy.model_management.soft_empty_cache()
    try:
        return _decode_in_chunks(vae, decoder, latents, _SMALL_CHUNK_BYTES, 0.0, buffers)
    except comfy.model_management.OOM_EXCEPTION as error:
        height, width = (8 * size for size in latents.shape[2:])
        raise torch.OutOfMemoryError(
            f"The card has no memory to decode {len(latents)} frames of {width}x{height}. The sampled latents are "
            "kept: lower chunk_frames of the decoding node, or close other programs that use the card, and queue the "
            f"workflow again. ({error})"
        ) from error


def _max_bytes(device: torch.device) -> float:
    """Bytes that decoding may use on a device."""
    if comfy.model_management.is_device_cpu(device):
        return math.inf
    return comfy.model_management.get_total_memory(device) * _MAX_SHARE


def _decode_in_chunks(
    vae: comfy.sd.VAE,
    decoder: VideoDecoder,
    latents: torch.Tensor,
    chunk_bytes: int,
    max_bytes: float,
    buffers: HostBuffers,
) -> torch.Tensor:
    """Decode with intermediates of `chunk_bytes`, and `max_bytes` on the device in total."""
    itemsize = vae.vae_dtype.itemsize
    frames, _, height, width = latents.shape
    # At the widest point, the first block of the last level: an input of half the size and an output, and for each
    # frame in work the input upsampled, convolved and normalized.
    last = decoder.up[0].block[0]
    each = 64 * height * width * itemsize
    working = 5 * max(each * last.in_channels, chunk_bytes)
    maps = frames * each * (last.in_channels / 4 + last.out_channels)
    needed = working + min(maps, max(max_bytes - working, 0.0))
    comfy.model_management.load_models_gpu([vae.patcher], memory_required=needed)
    buffers.begin()
    samples = latents.to(device=vae.device, dtype=vae.vae_dtype)
    with torch.no_grad(), limit_chunks(chunk_bytes):
        decoded = _decode(decoder, samples, max_bytes - working, buffers)
        pixels = vae.process_output(decoded.to(vae.output_device).float())
    return pixels.movedim(1, -1)


def _decode(decoder: VideoDecoder, z: torch.Tensor, max_bytes: float, buffers: HostBuffers) -> torch.Tensor:
    """ComfyUI's `Decoder.forward` for a decoder of `VideoResBlock`s: z [T, 4, H, W] -> [T, 3, 8 H, 8 W]."""
    first = CastWeights(z).conv2d(decoder.conv_in, z)
    x = FrameMaps.of(first.contiguous(memory_format=torch.channels_last), len(z))
    del first
    x = _block(decoder.mid.block_1, x, max_bytes, buffers)
    for index in range(len(z)):
        frame = x.frames(index, index + 1)
        frame.copy_(decoder.mid.attn_1(frame.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        x.store_frames(index, index + 1, frame)
    x = _block(decoder.mid.block_2, x, max_bytes, buffers)
    for level in reversed(range(decoder.num_resolutions)):
        for number, block in enumerate(decoder.up[level].block):
            upsampled = number == 0 and level + 1 < decoder.num_resolutions
            conv = decoder.up[level + 1].upsample.conv if upsampled else None
            x = _block(block, x, max_bytes, buffers, conv)
    return _out(decoder, x)


def _block(
    block: VideoResBlock, x: FrameMaps, max_bytes: float, buffers: HostBuffers, upsample: torch.nn.Conv2d | None = None
) -> FrameMaps:
    """A block, in place where its channels allow it; on frames of twice the size with `upsample`."""
    weights = CastWeights(x)
    shortcut = getattr(block, "nin_shortcut", None)
    count, _, height, width = x.shape
    reader: FrameReader = x
    if upsample is not None:
        height, width = 2 * height, 2 * width
        reader = UpsampledFrames(x, upsample, (height, width), weights)
    out = x
    if upsample is not None or shortcut is not None:
        shape = (count, block.out_channels, height, width)
        out = FrameMaps.empty(shape, x.dtype, x.device, max_bytes - x.device_bytes, buffers)
    halves = (block.norm1, block.conv1), (block.norm2, block.conv2)
    add_spatial_residual(reader, *halves, shortcut, None, weights, out)
    del x, reader  # the caller drops its reference as well once it has our result
    factor = block.get_alpha(1).to(out.device, out.dtype)
    add_temporal_residual(out, block.time_stack, None, factor, weights, keep=False)
    return out


def _out(decoder: VideoDecoder, x: FrameMaps) -> torch.Tensor:
    """The last norm and convolutions: x [T, C, H, W] -> [T, 3, H, W]."""
    weights = CastWeights(x)
    norm, conv = decoder.norm_out, decoder.conv_out
    count, channels, height, width = x.shape
    out = torch.empty(count, conv.out_channels, height, width, dtype=x.dtype, device=x.device)
    ranges = chunk_ranges(count, height * width * channels * x.dtype.itemsize * 2)
    for (start, end), part in zip(ranges, x.read_chunks(ranges), strict=True):
        normed = frame_group_norm(part, norm, weights)
        out[start:end] = functional.conv2d(functional.silu(normed, inplace=True), *weights(conv), padding=1)
    weight, bias = weights(conv.time_mix_conv)
    mixed = functional.conv3d(out.movedim(1, 0)[None], weight, bias, padding=conv.time_mix_conv.padding)
    return mixed[0].movedim(0, 1)
