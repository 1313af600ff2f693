"""CogVideoX's positions, against DiffSynth and diffusers, and their two transformers against each other."""

from __future__ import annotations

import pytest
import torch
from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel
from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid

import cogvideox
from exvideo_core.method.cogvideox import crop_region, reference_rotary

BASE = (30, 45)  # patches of 480x720


@pytest.fixture(scope="module")
def models() -> tuple[torch.nn.Module, CogVideoXTransformer3DModel]:
    theirs = cogvideox.reference_model()
    model = CogVideoXTransformer3DModel(**cogvideox.DIFFUSERS).eval()
    model.load_state_dict(cogvideox.diffusers_tensors(theirs))
    return theirs, model


@pytest.mark.parametrize("grid", [(30, 45), (15, 45), (20, 32), (45, 30), (33, 33), (7, 90)])
def test_positions_are_diffsynths(models, grid: tuple[int, int]) -> None:
    theirs = models[0].prepare_rotary_positional_embeddings(2 * grid[0], 2 * grid[1], 33, torch.device("cpu"))
    ours = reference_rotary(BASE, 64)(*grid, 33, torch.device("cpu"))
    for own, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own, their, atol=1e-5, rtol=0)


@pytest.mark.parametrize("grid", [(30, 45), (15, 45), (20, 32), (45, 30), (33, 33), (7, 90)])
def test_crop_regions_are_diffusers(grid: tuple[int, int]) -> None:
    (top, left), (bottom, right) = get_resize_crop_region_for_grid(grid, BASE[1], BASE[0])
    assert crop_region(grid, BASE) == ((top, bottom), (left, right))


@pytest.mark.parametrize("grid", [(30, 45), (20, 30)])
def test_one_call_of_diffusers_with_our_positions_is_diffsynths(models, grid: tuple[int, int]) -> None:
    """At the trained aspect ratio. Elsewhere, diffusers spaces a crop's positions differently from DiffSynth."""
    theirs, model = models
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 16, 2, 2 * grid[0], 2 * grid[1], generator=generator)
    prompt = torch.randn(1, 7, cogvideox.TEXT, generator=generator)
    time = torch.tensor([500.0])
    own = reference_rotary(BASE, 64)(*grid, 2, torch.device("cpu"))
    pipe = CogVideoXPipeline.__new__(CogVideoXPipeline)
    pipe.vae_scale_factor_spatial = 8
    object.__setattr__(pipe, "transformer", model)
    positions = pipe._prepare_rotary_positional_embeddings(16 * grid[0], 16 * grid[1], 2, torch.device("cpu"))
    with torch.no_grad():
        expected = theirs(x, time, prompt)
        for rotary in (own, positions):
            found = model(x.transpose(1, 2), prompt, time, image_rotary_emb=rotary, return_dict=False)[0].transpose(
                1, 2
            )
            assert float((found - expected).norm() / expected.norm()) <= 1e-5
