"""Clones for further GPUs, as far as two on the CPU tell: each has layers and tables of its own."""

from __future__ import annotations

import comfy.model_management
import comfy.model_patcher
import pytest
import torch

import svd
from exvideo_core.comfyui.apply.patch import apply_extension
from exvideo_core.comfyui.checkpoint.load import load_checkpoint
from exvideo_core.method.extension import Extension

pytestmark = pytest.mark.skipif(
    not hasattr(comfy.model_patcher.ModelPatcher, "deepclone_multigpu"),
    reason="this ComfyUI has no multi-GPU sampling (0.33 and later have)",
)


def call(model) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    sample = torch.randn(1, 6, 8, 8, 8, generator=generator)
    context = torch.randn(1, 1, 64, generator=generator)
    return svd.call_host(model, sample, 0.5, context, torch.tensor([[29.0, 127.0, 0.02]]))


@pytest.fixture
def model(small_models) -> comfy.model_patcher.ModelPatcher:
    return apply_extension(load_checkpoint(str(small_models[0]))[0], Extension.load(small_models[1]))


def storages(patcher) -> set[int]:
    comfy.model_management.load_models_gpu([patcher])
    return {value.untyped_storage().data_ptr() for value in patcher.model.diffusion_model.state_dict().values()}


def test_a_deep_clone_computes_the_same_with_weights_of_its_own(model) -> None:
    expected = call(model)
    clone = model.deepclone_multigpu(torch.device("cpu"))
    assert clone.model is not model.model
    for path, layer in model.object_patches.items():
        if isinstance(layer, torch.nn.Module):
            assert clone.object_patches[path] is not layer
    assert not storages(clone) & storages(model)
    assert call(clone).equal(expected)
    assert call(model).equal(expected)


def test_a_matched_clone_keeps_its_layers(model) -> None:
    """Before every run the host makes the further GPUs' clones anew from the main one."""
    expected = call(model)
    model.set_additional_models("multigpu", [model.deepclone_multigpu(torch.device("cpu"))])
    made = []
    for _ in range(2):
        model.match_multigpu_clones()
        (clone,) = model.get_additional_models_with_key("multigpu")
        made.append({path: layer for path, layer in clone.object_patches.items() if isinstance(layer, torch.nn.Module)})
        assert call(clone).equal(expected)
    assert all(made[0][path] is layer for path, layer in made[1].items())
    assert not any(model.object_patches[path] is layer for path, layer in made[0].items())
    assert call(model).equal(expected)
