"""SVD's temporal VAE decoder with bounded memory, on as many frames at once as it is told."""

from __future__ import annotations

import comfy.model_management
import comfy.sd
import torch
from comfy.ldm.modules.temporal_ae import VideoDecoder, VideoResBlock
from torch.nn import functional

from ... import chunks
from ...skips import Joined
from .layers import picture_norm
from .resblock import Enlarged, add_time_residual, frames_residual
from .resident import Resident

#: The same however much memory is free: kernels round differently for chunks of another size.
_BUDGET = chunks.Budget(64 * chunks.MEGABYTE)


def decode_chunk(vae: comfy.sd.VAE, latents: torch.Tensor) -> torch.Tensor:
    """Decode frames together, as SVD's decoder was made to, whatever memory is free.

    The host's own `VAE.decode` cuts them by free memory, and the decoder sees only what it is given together. Other
    VAEs than SVD's are left to the host.

    Args:
        latents: [T, 4, H, W].

    Returns:
        0..1 [T, 8 H, 8 W, 3] on the host's device for results.
    """
    decoder = getattr(vae.first_stage_model, "decoder", None)
    if not isinstance(decoder, VideoDecoder) or decoder.time_mode != "conv-only":
        return vae.decode(latents)
    _load(vae, latents, decoder)
    samples = latents.to(device=vae.device, dtype=vae.vae_dtype)
    with torch.no_grad(), chunks.use(_BUDGET):
        pixels = vae.process_output(_decode(decoder, samples).to(vae.output_device).float())
    return pixels.movedim(1, -1)


def _load(vae: comfy.sd.VAE, latents: torch.Tensor, decoder: VideoDecoder) -> None:
    # At its widest, in the first block of the last level: an input of half the size, and an output.
    last = decoder.up[0].block[0]
    frames, _, height, width = latents.shape
    values = frames * 64 * height * width * (last.in_channels / 4 + last.out_channels) * 1.1
    needed = values * vae.vae_dtype.itemsize + 6 * _BUDGET.chunk_bytes
    comfy.model_management.load_models_gpu([vae.patcher], memory_required=needed)


def _decode(decoder: VideoDecoder, z: torch.Tensor) -> torch.Tensor:
    """`Decoder.forward` of the host, for a decoder of `VideoResBlock`s. z: [T, 4, H, W] -> [T, 3, 8 H, 8 W]."""
    x = functional.conv2d(z, *Resident(z)(decoder.conv_in), padding=1).contiguous(memory_format=torch.channels_last)
    x = _block(decoder.mid.block_1, x)
    for frame in range(len(x)):
        x[frame : frame + 1] = decoder.mid.attn_1(x[frame : frame + 1])
    x = _block(decoder.mid.block_2, x)
    for level in reversed(range(decoder.num_resolutions)):
        for number, block in enumerate(decoder.up[level].block):
            enlarged = number == 0 and level + 1 < decoder.num_resolutions
            conv = decoder.up[level + 1].upsample.conv if enlarged else None
            x = _block(block, x, conv)
    return _out(decoder, x)


def _block(block: VideoResBlock, x: torch.Tensor, enlarging: torch.nn.Conv2d | None = None) -> torch.Tensor:
    """A block, in place where its channels allow it; on pictures twice the size behind `enlarging`."""
    weights = Resident(x)
    shortcut = getattr(block, "nin_shortcut", None)
    height, width = x.shape[-2:]
    given = Joined([x]) if enlarging is None else Enlarged(x, enlarging, (2 * height, 2 * width))
    in_place = x if enlarging is None and shortcut is None else None
    halves = (block.norm1, block.conv1), (block.norm2, block.conv2)
    out = frames_residual(given, *halves, shortcut, None, weights, in_place)
    del x, given, in_place  # the caller's reference goes as well once it has our result
    share = block.get_alpha(1).to(out)
    add_time_residual(out, block.time_stack, len(out), None, share, weights, keep=False)
    return out


def _out(decoder: VideoDecoder, x: torch.Tensor) -> torch.Tensor:
    weights = Resident(x)
    norm, conv = decoder.norm_out, decoder.conv_out
    count, channels, height, width = x.shape
    out = torch.empty(count, conv.out_channels, height, width, dtype=x.dtype, device=x.device)
    for start, end in chunks.spans(count, height * width * channels * x.element_size() * 2):
        normed = picture_norm(x[start:end], norm, weights)
        out[start:end] = functional.conv2d(functional.silu(normed, inplace=True), *weights(conv), padding=1)
    weight, bias = weights(conv.time_mix_conv)
    mixed = functional.conv3d(out.movedim(1, 0)[None], weight, bias, padding=conv.time_mix_conv.padding)
    return mixed[0].movedim(0, 1)
