"""Convolutions of three taps along one axis with half the multiplications: Winograd's F(4, 3).

Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (2016), section 4.1: four outputs of a 3-tap filter
from six products instead of twelve. With products of whole channel vectors, and of the taps along the other axes, these
are six ordinary convolutions of a quarter of the length. Exact but for rounding, of which a float32 convolution of
SVD's widths has twice as much (2e-6 relative instead of 1e-6).

A processor computes SVD's convolutions at its peak, so that only fewer multiplications are faster. GPUs have kernels of
their own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional

#: Of the taps g: products are taken with these, the points being 0, 1, -1, 2, -2 and infinity.
_TAPS = (
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)
#: Narrower layers spend more on the sums than they save on products.
NARROWEST = 128


def pays(x: torch.Tensor, out_channels: int, length: int) -> bool:
    """Whether the axis of `length` is worth it. Never a matter of how many there are of it: chunks of a layer are all
    computed in the same way, and so is the whole.

    Args:
        x: what is convolved; only its device and type are read.
    """
    computed = 4 * -(-length // 4)
    on_cpu = x.device.type == "cpu" and x.dtype == torch.float32
    return on_cpu and out_channels >= NARROWEST and computed <= 1.25 * length


def transformed(weight: torch.Tensor, dim: int) -> list[torch.Tensor]:
    """The six filters of one whose three taps lie along `dim`, which is gone from them."""
    parts = weight.unbind(dim)
    return [sum(factor * part for factor, part in zip(row, parts, strict=True) if factor) for row in _TAPS]


def _inputs(x: torch.Tensor, dim: int) -> tuple[torch.Tensor, ...]:
    """What the six filters read, of 4 n + 2 places along `dim`: n places each."""
    count = (x.shape[dim] - 2) // 4
    index: list[slice] = [slice(None)] * x.ndim
    places = []
    for first in range(6):
        index[dim] = slice(first, first + 4 * (count - 1) + 1, 4)
        places.append(x[tuple(index)])
    a, b, c, d, e, f = places
    even, odd = torch.sub(e, c, alpha=4), torch.sub(d, b, alpha=4)
    even_2, odd_2 = e - c, (d - b).mul_(2)
    first = torch.sub(e, c, alpha=5).add_(a, alpha=4)
    last = torch.sub(f, d, alpha=5).add_(b, alpha=4)
    return first, even + odd, even - odd, even_2 + odd_2, even_2 - odd_2, last


def _outputs(products: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Every fourth output from 0, 1, 2 and 3. Overwrites what it is given."""
    a, b, c, d, e, f = products
    near, near_odd = b + c, b.sub_(c)
    far, far_odd = d + e, d.sub_(e)
    return (
        a.add_(near).add_(far),
        torch.add(near_odd, far_odd, alpha=2),
        torch.add(near, far, alpha=4),
        f.add_(near_odd).add_(far_odd, alpha=8),
    )


def row_filters(weight: torch.Tensor) -> list[torch.Tensor]:
    """For `convolve_rows`, of a 3x3 convolution [C', C, 3, 3]: six of [C', C, 1, 3]."""
    return [part[:, :, None].contiguous(memory_format=torch.channels_last) for part in transformed(weight, 2)]


def convolve_rows(x: torch.Tensor, filters: Sequence[torch.Tensor], bias: torch.Tensor | None) -> torch.Tensor:
    """A 3x3 convolution with zeros around the picture.

    Args:
        x: channels last [N, C, H, W].
        filters: of `row_filters`.
        bias: [C'].

    Returns:
        channels last [N, C', H, W].
    """
    count, _, height, width = x.shape
    below = -height % 4 + 1
    rows = functional.pad(x.permute(0, 2, 3, 1), (0, 0, 0, 0, 1, below))
    products = [
        functional.conv2d(part.permute(0, 3, 1, 2), weight, padding=(0, 1)).permute(0, 2, 3, 1)
        for part, weight in zip(_inputs(rows, 1), filters, strict=True)
    ]
    out = x.new_empty(count, height, width, filters[0].shape[0])
    for place, part in enumerate(_outputs(products)):
        target = out[:, place::4]
        _write(target, part[:, : target.shape[1]], bias)
    return out.permute(0, 3, 1, 2)


def frame_filters(weight: torch.Tensor) -> list[torch.Tensor]:
    """For `convolve_frames`, of a 3x3 convolution over three frames' channels [C', 3 C, 3, 3]: six [C', C, 3, 3]."""
    parts = transformed(weight.unflatten(1, (3, -1)), 1)
    return [part.contiguous(memory_format=torch.channels_last) for part in parts]


def convolve_frames(
    padded: torch.Tensor, filters: Sequence[torch.Tensor], bias: torch.Tensor | None, frames: int
) -> torch.Tensor:
    """A 3x3x3 convolution of frames that are padded already.

    Args:
        padded: [B, T + 2, H + 2, W + 2, C], T being `frames` rounded up to a multiple of four; what is beyond
            `frames` + 2 has to be finite.
        filters: of `frame_filters`.
        bias: [C'].

    Returns:
        [B, frames, H, W, C'].
    """
    batch, _, height, width, _ = padded.shape
    products = [
        functional.conv2d(part.flatten(0, 1).permute(0, 3, 1, 2), weight).permute(0, 2, 3, 1).unflatten(0, (batch, -1))
        for part, weight in zip(_inputs(padded, 1), filters, strict=True)
    ]
    out = padded.new_empty(batch, frames, height - 2, width - 2, filters[0].shape[0])
    for place, part in enumerate(_outputs(products)):
        target = out[:, place::4]
        _write(target, part[:, : target.shape[1]], bias)
    return out


def _write(target: torch.Tensor, part: torch.Tensor, bias: torch.Tensor | None) -> None:
    if bias is None:
        target.copy_(part)
    else:
        torch.add(part, bias, out=target)
