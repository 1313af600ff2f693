"""Training-free ways to longer videos, as their authors describe them: FreeLong and FreeNoise.

Both change only temporal self-attention, and FreeNoise the initial noise as well. They are rows of `bench method` (on
the base alone) and `bench length` (on the extended model), not part of the pack.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

STOP_FREQUENCY = 0.25  # of FreeLong's low-pass filter, in time and space, as its authors set it
#: Temporal attention of tokens [pixels, T, C], under an additive mask [T, T] or none.
Attend = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]


def low_pass(frames: int, height: int, width: int, stop: float = STOP_FREQUENCY) -> torch.Tensor:
    """Gaussian low-pass filter over the frequencies of `torch.fft.fftn`, 1 at frequency 0 (FreeLong, equation 7).

    Returns:
        [T, H, W].
    """
    squares = [
        (torch.fft.fftfreq(size) * 2 / stop).square().view([-1 if axis == own else 1 for axis in range(3)])
        for own, size in enumerate((frames, height, width))
    ]
    return torch.exp(-0.5 * (squares[0] + squares[1] + squares[2]))


def local_mask(frames: int, window: int) -> torch.Tensor:
    """Additive mask under which each frame attends to the `window` frames nearest to it.

    At the ends of the video, windows are shifted inward, so that all have the same size.

    Returns:
        [T, T], 0 or -inf.
    """
    window = min(window, frames)
    starts = (torch.arange(frames) - window // 2).clamp(0, frames - window)
    offset = torch.arange(frames)[None] - starts[:, None]
    mask = torch.zeros(frames, frames)
    return mask.masked_fill((offset < 0) | (offset >= window), -math.inf)


def spectral_blend(whole: torch.Tensor, local: torch.Tensor) -> torch.Tensor:
    """Low frequencies of one set of features with the high frequencies of another (FreeLong, equations 5 and 6).

    Args:
        whole, local: features [T, H, W, C].
    """
    keep = low_pass(*whole.shape[:3]).to(whole.device)[..., None]
    spectra = [torch.fft.fftn(features.float(), dim=(0, 1, 2)) for features in (whole, local)]
    mixed = spectra[0] * keep + spectra[1] * (1 - keep)
    return torch.fft.ifftn(mixed, dim=(0, 1, 2)).real.to(whole.dtype)


def freelong(attend: Attend, tokens: torch.Tensor, window: int, largest: int) -> torch.Tensor:
    """FreeLong's temporal attention (Lu et al., 2407.19918).

    Features of the whole video and of sliding windows are blended by frequency. The UNet's largest resolution only
    uses the windows, as in the authors' code.

    Args:
        attend: the model's attention.
        tokens: of a square frame [H * W, T, C].
        window: trained length of the model in frames.
        largest: pixels H * W of the UNet's largest resolution.
    """
    pixels, frames, _ = tokens.shape
    local = attend(tokens, local_mask(frames, window).to(tokens))
    if pixels >= largest:
        return local
    side = math.isqrt(pixels)
    both = (features.unflatten(0, (side, side)).movedim(2, 0) for features in (attend(tokens, None), local))
    return spectral_blend(*both).movedim(0, 2).flatten(0, 1)


def freenoise_attention(attend: Attend, tokens: torch.Tensor, window: int) -> torch.Tensor:
    """FreeNoise's window-based attention fusion (Qiu et al., 2310.15169, section 4.2).

    Windows are shifted by a quarter of their size. Where they overlap, they are averaged with weights that fall with
    the distance from the middle of the window.

    Args:
        attend: the model's attention.
        tokens: [pixels, T, C].
        window: trained length of the model in frames.
    """
    frames = tokens.shape[1]
    if frames <= window:
        return attend(tokens, None)
    stride = max(window // 4, 1)
    starts = [*range(0, frames - window, stride), frames - window]
    places = torch.arange(window, device=tokens.device)
    weights = torch.minimum(places + 1, window - places).to(tokens)[:, None]
    fused, weight_sum = torch.zeros_like(tokens), tokens.new_zeros(frames, 1)
    for start in starts:
        part = slice(start, start + window)
        fused[:, part] += attend(tokens[:, part], None) * weights
        weight_sum[part] += weights
    return fused / weight_sum


class TemporalProcessor:
    """Attention processor of diffusers for the temporal self-attention of SVD's UNet.

    Args:
        processor: the processor to replace, which is called for the attention itself.
        change: maps an `Attend` and tokens of one video to features.
    """

    def __init__(self, processor: Callable[..., torch.Tensor], change: Callable[..., torch.Tensor]) -> None:
        self.processor = processor
        self.change = change
        self.videos = 1

    def __call__(self, attention: torch.nn.Module, tokens: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:  # noqa: ANN401
        def attend(own: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
            mask = None if mask is None else mask.expand(len(own), -1, -1)
            return self.processor(attention, own, *rest, attention_mask=mask, **options)

        options.pop("attention_mask", None)
        return torch.cat([self.change(attend, video) for video in tokens.chunk(self.videos)])


def change_unet(unet: torch.nn.Module, change: Callable[..., torch.Tensor]) -> None:
    """Change the temporal self-attention of a UNet of diffusers, in place."""
    processors = []
    for name, module in unet.named_modules():
        if name.endswith("temporal_transformer_blocks.0.attn1"):
            processors.append(TemporalProcessor(module.processor, change))
            module.set_processor(processors[-1])

    def count_videos(_: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        for processor in processors:
            processor.videos = len(arguments[0])

    unet.register_forward_pre_hook(count_videos)


def change_model(model: Any, change: Callable[..., torch.Tensor]) -> Any:  # noqa: ANN401 - ComfyUI's ModelPatcher
    """A clone of ComfyUI's SVD model with changed temporal self-attention."""
    changed = model.clone()
    for name, module in changed.model.named_modules():
        if name.endswith("time_stack.0.attn1"):
            changed.add_object_patch(f"{name}.forward", _host_forward(module.forward, change))
    return changed


def _host_forward(forward: Callable[..., torch.Tensor], change: Callable[..., torch.Tensor]) -> Callable:
    def changed(
        tokens: torch.Tensor,
        context: torch.Tensor | None = None,  # noqa: ARG001 - self-attention
        value: torch.Tensor | None = None,  # noqa: ARG001
        mask: torch.Tensor | None = None,  # noqa: ARG001
        **options: Any,  # noqa: ANN401
    ) -> torch.Tensor:
        def attend(own: torch.Tensor, own_mask: torch.Tensor | None) -> torch.Tensor:
            return forward(own, mask=own_mask, **options)

        # With guidance, a call can contain the videos of both conditions.
        videos = len(options.get("transformer_options", {}).get("cond_or_uncond", [0]))
        return torch.cat([change(attend, video) for video in tokens.chunk(videos)])

    return changed
