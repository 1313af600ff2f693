"""The positional convolution against numpy's padding and a loop over the kernel."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from exvideo_core.method.convolution import identity_convolution, padded_rows, positional_convolution, reflect_pad


@pytest.mark.parametrize("shape", [(2, 5, 4, 3), (1, 1, 4, 4), (1, 4, 1, 3), (1, 3, 2, 1), (1, 1, 1, 1)])
def test_reflect_pad_is_numpys(shape: tuple[int, ...]) -> None:
    x = torch.randn(*shape, 6)
    expected = np.pad(x.numpy(), ((0, 0), (1, 1), (1, 1), (1, 1), (0, 0)), mode="reflect")
    assert np.array_equal(reflect_pad(x).numpy(), expected)


def test_positional_convolution_by_hand() -> None:
    frames, height, width, channels = 4, 3, 5, 2
    x = torch.randn(2 * frames, height * width, channels, dtype=torch.float64)
    positions = torch.randn(frames, channels, dtype=torch.float64)
    conv = torch.nn.Conv3d(channels, channels, 3, dtype=torch.float64).requires_grad_(False)
    result = positional_convolution(x, positions, conv, height, width)

    clips = x.numpy().reshape(2, frames, height, width, channels) + positions.numpy()[:, None, None]
    padded = np.pad(clips, ((0, 0), (1, 1), (1, 1), (1, 1), (0, 0)), mode="reflect")
    expected = np.zeros_like(clips) + conv.bias.numpy()
    for t in range(3):
        for i in range(3):
            for j in range(3):
                part = padded[:, t : t + frames, i : i + height, j : j + width]
                expected += part @ conv.weight[:, :, t, i, j].numpy().T
    expected = expected.transpose(0, 2, 3, 1, 4).reshape(2 * height * width, frames, channels)
    np.testing.assert_allclose(result.numpy(), expected, atol=1e-12)


def test_the_identity_changes_nothing() -> None:
    x = torch.randn(1, 4, 5, 5, 5)
    assert torch.nn.functional.conv3d(x, identity_convolution(4)).equal(x[:, :, 1:-1, 1:-1, 1:-1])


@pytest.mark.parametrize("rows", [(0, 5), (0, 2), (2, 3), (4, 5)])
def test_padded_rows_are_those_of_the_whole(rows: tuple[int, int]) -> None:
    start, end = rows
    clips, positions = torch.randn(2, 4, 5, 3, 6), torch.randn(4, 6)
    whole = reflect_pad(clips + positions[:, None, None])
    above = None if start == 0 else clips[:, :, start - 1]
    assert padded_rows(clips, start, end, above, positions).equal(whole[:, :, start : end + 2])
