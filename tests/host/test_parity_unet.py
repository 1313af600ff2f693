"""One call of the patched host's UNet against the reference's."""

from __future__ import annotations

import pytest
import torch

import svd
from exvideo_core.comfyui.apply.patch import apply_extension


@pytest.fixture(scope="module")
def pair() -> svd.Pair:
    return svd.make_pair()


@pytest.fixture(scope="module")
def oracle(pair: svd.Pair) -> torch.nn.Module:
    return pair.reference()


def inputs(clips: int, frames: int, height: int, width: int, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(frames + height)
    sample = torch.randn(clips, frames, 8, height, width, generator=generator).to(dtype)
    context = torch.randn(clips, 1, svd.CONTEXT, generator=generator).to(dtype)
    ids = torch.tensor([[29.0, 127.0, 0.02], [6.0, 40.0, 0.1]])[:clips]
    return sample, context, ids


def call_reference(unet: torch.nn.Module, sample, timestep, context, ids) -> torch.Tensor:
    with torch.no_grad():
        return torch.stack([unet(s, timestep, c, i[None]) for s, c, i in zip(sample, context, ids, strict=True)])


@pytest.mark.parametrize(
    ("clips", "frames", "height", "width"),
    [(1, 40, 16, 24), (2, 40, 16, 16), (1, 128, 16, 24), pytest.param(2, 128, 16, 16, marks=pytest.mark.nightly)],
)
def test_one_call_matches_the_reference(pair, oracle, clips, frames, height, width) -> None:
    sample, context, ids = inputs(clips, frames, height, width)
    expected = call_reference(oracle, sample, 0.7, context, ids)
    patched = apply_extension(pair.base, pair.extension)
    error = svd.relative_error(svd.call_host(patched, sample, 0.7, context, ids), expected)
    print(f"relative error {error:.2e}")
    assert error < 5e-5
    # The extension matters: the base without it is far away.
    assert svd.relative_error(svd.call_host(pair.base, sample, 0.7, context, ids), expected) > 0.1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_loses_no_more_than_the_reference_does(dtype: torch.dtype) -> None:
    half = svd.make_pair(dtype)
    exact = half.reference(torch.float32)
    sample, context, ids = inputs(1, 4, 16, 16, dtype)
    truth = call_reference(exact, sample.float(), 0.7, context.float(), ids)
    theirs = svd.relative_error(call_reference(half.reference(dtype), sample, 0.7, context, ids), truth)
    ours = svd.relative_error(
        svd.call_host(apply_extension(half.base, half.extension), sample, 0.7, context, ids), truth
    )
    print(f"{dtype}: ours {ours:.2e}, the reference's {theirs:.2e}")
    # The two round at different places: their ratio scatters by about 2 % around 1 from input to input.
    assert ours <= 1.05 * theirs
