"""Convolutions with fewer multiplications, and by rows, against PyTorch's own in float64."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from exvideo_core import winograd
from exvideo_core.temporal import as_picture_convolution, convolve_padded, padded_rows, positional_convolution


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize(("height", "width"), [(4, 5), (16, 16), (7, 3), (1, 2), (13, 8)])
@pytest.mark.parametrize("biased", [True, False])
def test_rows(height: int, width: int, biased: bool) -> None:
    x = torch.randn(3, 24, height, width).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(40, 24, 3, 3), torch.randn(40) if biased else None
    found = winograd.convolve_rows(x, winograd.row_filters(weight), bias)
    expected = functional.conv2d(x.double(), weight.double(), None if bias is None else bias.double(), padding=1)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert relative_error(found, expected) < 3e-6


@pytest.mark.parametrize("frames", [1, 4, 7, 25])
@pytest.mark.parametrize("rows", [1, 2, 5])
def test_frames_by_rows(frames: int, rows: int) -> None:
    """Both ways, chunk by chunk, are the convolution of the whole, positions and reflected borders included."""
    clips, height, width, channels = 2, 5, 4, 12
    tokens = torch.randn(clips * frames, height * width, channels)
    positions = torch.randn(frames, channels)
    conv = torch.nn.Conv3d(channels, channels, 3).requires_grad_(False)
    expected = positional_convolution(tokens.double(), positions.double(), conv.double(), height, width)
    expected = expected.view(clips, height, width, frames, channels).permute(0, 3, 1, 2, 4)
    weight, bias = as_picture_convolution(conv.weight.float()), conv.bias.float()
    x = tokens.view(clips, frames, height, width, channels)
    direct, fast = [], []
    above = None
    for start in range(0, height, rows):
        end = min(start + rows, height)
        padded = padded_rows(x, start, end, above, positions)
        above = x[:, :, end - 1]
        direct.append(convolve_padded(padded, weight, bias, frames))
        fast.append(winograd.convolve_frames(padded, winograd.frame_filters(weight), bias, frames))
    assert relative_error(torch.cat(direct, 2), expected) < 1e-6
    assert relative_error(torch.cat(fast, 2), expected) < 3e-6


def test_only_where_it_pays() -> None:
    wide = torch.empty(8, 320, 32, 32)
    assert winograd.pays(wide, 320, 32) and winograd.pays(wide[:1, :, :1], 320, 32)
    assert not winograd.pays(wide.half(), 320, 32)  # six products in half precision would lose digits
    assert not winograd.pays(wide, 64, 32)
    assert not winograd.pays(wide, 320, 5)  # eight places would be computed for five
    assert not winograd.pays(wide.to("meta"), 320, 32)
