"""Dynamic VRAM over many models in one process, and cards with more or less free memory."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import comfy.model_management
import comfy.model_patcher
import comfy.sample
import comfy_aimdo.model_vbar
import pytest
import torch

from exvideo_core.extension import Extension
from exvideo_core.hosts.comfyui.checkpoint import load_checkpoint
from exvideo_core.hosts.comfyui.patch import apply_extension
from runner import simulated_card
from runner.simulated_card import GIB
from small_model import recipe

Model = comfy.model_patcher.ModelPatcher


@pytest.fixture
def model() -> Iterator[Model]:
    with torch.inference_mode():
        yield load_checkpoint(str(recipe.CHECKPOINT))[0]
    comfy.model_management.unload_all_models()
    gc.collect()


@pytest.fixture(scope="module")
def extension() -> Extension:
    return Extension.load(recipe.EXTENSION)


def sampled(model: Model, frames: int = 4, steps: int = 1, size: int = 8) -> torch.Tensor:
    """A clip's latents [T, 4, H, W], and the end of a node as the host has it."""
    generator = torch.Generator().manual_seed(0)
    latent = torch.zeros(frames, 4, size, size)
    conditioning = [[
        torch.randn(1, 1, 64, generator=generator),
        {"motion_bucket_id": 127, "fps": 30, "augmentation_level": 0.0,
         "concat_latent_image": torch.randn(1, 4, size, size, generator=generator)},
    ]]  # fmt: skip
    noise = comfy.sample.prepare_noise(latent, 0)
    try:
        return comfy.sample.sample(
            model, noise, steps, 1.0, "euler", "karras", conditioning, conditioning, latent, disable_pbar=True
        )
    finally:
        comfy.model_management.reset_cast_buffers()
        comfy_aimdo.model_vbar.vbars_reset_watermark_limits()


def test_two_hundred_applies_in_one_process(model: Model, extension: Extension) -> None:
    """Neither addresses nor pins of dynamic VRAM grow with the number of applies; the addresses would run out."""
    offsets, results = [], {}
    for number in range(200):
        strength = (0.25, 0.5, 0.75, 1.0)[number % 4]
        found = sampled(apply_extension(model, extension, strength))
        assert found.equal(results.setdefault(strength, found)), f"apply {number}"
        (vbar,) = (vbar for vbar in simulated_card.dynamic_memory().vbars if vbar is model._vbar_get())
        offsets.append(vbar.offset)
        assert vbar.pins == 0
    assert len({tuple(found.flatten().tolist()) for found in results.values()}) == 4
    assert max(offsets[20:]) <= max(offsets[:20])


@pytest.mark.parametrize("dynamic", [False, True])
def test_free_memory_does_not_change_the_latents(dynamic: bool, model: Model, extension: Extension) -> None:
    patched = apply_extension(model, extension)
    if not dynamic:
        patched = patched.clone(disable_dynamic=True)
    found = []
    for free in (3 * GIB, GIB):
        taken = torch.empty(simulated_card.memory().free - free, dtype=torch.uint8, device="cuda")
        found.append(sampled(patched, frames=48, size=32))
        del taken
    assert found[0].equal(found[1])
