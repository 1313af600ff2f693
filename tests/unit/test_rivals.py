"""FreeLong and FreeNoise of the benchmarks, compared to their formulas written out."""

from __future__ import annotations

import cmath
import itertools
import math
from functools import partial

import numpy as np
import pytest
import torch

from benchmarks import rivals

FRAMES, SIDE, CHANNELS, WINDOW = 6, 2, 3, 3


def _attend(tokens: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    return torch.nn.functional.scaled_dot_product_attention(tokens, tokens, tokens, attn_mask=mask)


def _tokens(frames: int = FRAMES) -> torch.Tensor:
    return torch.randn(SIDE**2, frames, CHANNELS, generator=torch.Generator().manual_seed(0))


def _dft(values: np.ndarray, sign: int) -> np.ndarray:
    """Discrete Fourier transform of [T, H, W], term by term."""
    shape = values.shape
    found = np.zeros(shape, dtype=complex)
    for frequency in itertools.product(*map(range, shape)):
        for place in itertools.product(*map(range, shape)):
            turns = sum(f * p / n for f, p, n in zip(frequency, place, shape, strict=True))
            found[frequency] += values[place] * cmath.exp(sign * 2j * math.pi * turns)
    return found


def _gauss(frequency: tuple[int, ...], shape: tuple[int, ...]) -> float:
    """exp(-d^2 / 2) of a frequency between -1 and 1 (Nyquist) on each axis, in multiples of the stop frequency."""
    signed = [(f if f < (n + 1) // 2 else f - n) / (n / 2) for f, n in zip(frequency, shape, strict=True)]
    return math.exp(-sum((value / 0.25) ** 2 for value in signed) / 2)


def test_spectral_blend_is_the_published_formula() -> None:
    shape = (FRAMES, SIDE, SIDE)
    whole, local = (np.random.default_rng(seed).normal(size=shape) for seed in (0, 1))
    spectra = _dft(whole, -1), _dft(local, -1)
    mixed = np.zeros(shape, dtype=complex)
    for frequency in itertools.product(*map(range, shape)):
        low = _gauss(frequency, shape)
        mixed[frequency] = low * spectra[0][frequency] + (1 - low) * spectra[1][frequency]
    expected = _dft(mixed, 1).real / whole.size
    blended = rivals.spectral_blend(*(torch.from_numpy(each)[..., None] for each in (whole, local)))[..., 0]
    np.testing.assert_allclose(blended.numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("window", [3, 4])
def test_each_frame_attends_to_the_nearest_frames(window: int) -> None:
    allowed = rivals.local_mask(FRAMES, window) == 0
    assert (allowed.sum(1) == window).all()
    for frame in range(FRAMES):
        seen = allowed[frame].nonzero()[:, 0].tolist()
        assert seen == list(range(seen[0], seen[0] + window))
        assert frame in seen
        inner = window // 2 <= frame <= FRAMES - (window - window // 2)
        assert not inner or seen[0] == frame - window // 2


def test_freelong_within_the_trained_length_changes_nothing() -> None:
    tokens = _tokens()
    found = rivals.freelong(_attend, tokens, window=FRAMES, largest=64)
    torch.testing.assert_close(found, _attend(tokens, None), atol=1e-6, rtol=0)


def test_freelong_blends_below_the_largest_resolution_only() -> None:
    tokens = _tokens()
    local = torch.stack(
        [
            _attend(tokens[:, start : start + WINDOW], None)[:, frame - start]
            for frame, start in enumerate([0, 0, 1, 2, 3, 3])
        ],
        dim=1,
    )
    torch.testing.assert_close(rivals.freelong(_attend, tokens, WINDOW, largest=4), local, atol=1e-6, rtol=0)
    videos = [each.reshape(SIDE, SIDE, FRAMES, CHANNELS).permute(2, 0, 1, 3) for each in (_attend(tokens, None), local)]
    blended = rivals.spectral_blend(*videos).permute(1, 2, 0, 3).reshape(SIDE**2, FRAMES, CHANNELS)
    found = rivals.freelong(_attend, tokens, WINDOW, largest=16)
    torch.testing.assert_close(found, blended, atol=1e-6, rtol=0)
    assert (found - local).abs().max() > 1e-2


def test_in_comfyui_the_videos_of_both_conditions_stay_apart() -> None:
    change = partial(rivals.freelong, window=WINDOW, largest=64)
    forward = rivals._host_forward(lambda tokens, mask=None, **_: _attend(tokens, mask), change)
    first, second = _tokens(), _tokens().flip(2)
    expected = torch.cat([change(_attend, video) for video in (first, second)])
    found = forward(torch.cat([first, second]), transformer_options={"cond_or_uncond": [0, 1]})
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(forward(first, transformer_options={}), expected[: len(first)], atol=1e-6, rtol=0)


def test_freenoise_averages_windows_by_distance_from_their_middle() -> None:
    tokens, window = _tokens(11), 8  # windows begin at 0, 2 and 3
    expected = torch.zeros_like(tokens)
    for frame in range(11):
        weights, values = [], []
        for start in (0, 2, 3):
            if start <= frame < start + window:
                weights.append(window / 2 - abs(frame - start - (window - 1) / 2) + 0.5)
                values.append(_attend(tokens[:, start : start + window], None)[:, frame - start])
        expected[:, frame] = sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)
    torch.testing.assert_close(rivals.freenoise_attention(_attend, tokens, window), expected, atol=1e-6, rtol=0)
