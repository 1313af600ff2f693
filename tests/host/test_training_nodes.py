"""Gradients flow through an extended model: the host's own training node trains on it."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import comfy.model_management
import pytest
import torch

import svd
from composition import conditioning, node, noise_of
from exvideo_core.comfyui.apply.patch import apply_extension
from exvideo_core.comfyui.checkpoint.load import load_checkpoint
from exvideo_core.method.extension import Extension

SETTINGS = {
    "batch_size": 4, "steps": 2, "grad_accumulation_steps": 1, "learning_rate": 1e-3, "rank": 2, "optimizer": "AdamW",
    "loss_function": "MSE", "seed": 0, "training_dtype": "fp32", "lora_dtype": "fp32", "quantized_backward": False,
    "algorithm": "LoRA", "gradient_checkpointing": True, "checkpoint_depth": 1, "offloading": False,
    "existing_lora": "[None]", "bucket_mode": False, "bypass_mode": False,
}  # fmt: skip


class Models(NamedTuple):
    base: Any
    extended: Any
    unchanged: Any


@pytest.fixture(scope="module")
def models(small_models) -> Models:
    base, extension = load_checkpoint(str(small_models[0]))[0], Extension.load(small_models[1])
    return Models(base, apply_extension(base, extension), apply_extension(base, extension, strength=0.0))


def call(model, sample: torch.Tensor) -> torch.Tensor:
    context = torch.ones(len(sample), 1, 64)
    ids = model.model.embedder(torch.tensor([29.0, 127.0, 0.02])).flatten().expand(len(sample), -1)
    options = {**model.model_options["transformer_options"], "wrappers": model.wrappers}
    return model.model.diffusion_model(
        sample, torch.full((len(sample),), 0.5), context=context, y=ids, num_video_frames=len(sample),
        transformer_options=options,
    )  # fmt: skip


def gradient(model, sample: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The result of a call, and the gradient of its sum."""
    comfy.model_management.load_models_gpu([model])
    sample = sample.clone().requires_grad_()
    out = call(model, sample)
    return out.detach(), torch.autograd.grad(out.sum(), sample)[0]


def test_gradients_are_those_of_what_sampling_computes(models) -> None:
    """Against a difference of two calls without gradients, which are computed in chunks."""
    extended = models.extended
    generator = torch.Generator().manual_seed(1)
    sample, way = (torch.randn(4, 8, 8, 8, generator=generator) for _ in range(2))
    out, found = gradient(extended, sample)
    step = 1e-4
    with torch.no_grad():
        assert svd.relative_error(out, call(extended, sample)) < 1e-5
        ahead, behind = (call(extended, sample + sign * step * way).double().sum() for sign in (1, -1))
    assert (found * way).sum().item() == pytest.approx((ahead - behind).item() / (2 * step), rel=5e-2)


def test_at_strength_zero_gradients_are_the_hosts(models) -> None:
    base, extended = models.base, models.extended
    sample = torch.randn(4, 8, 8, 8, generator=torch.Generator().manual_seed(1))
    expected = gradient(base, sample)[1]
    assert svd.relative_error(gradient(models.unchanged, sample)[1], expected) < 1e-4
    assert svd.relative_error(gradient(extended, sample)[1], expected) > 0.05


@pytest.mark.parametrize("bypass", [False, True])
def test_the_hosts_training_node_trains(models, bypass: bool) -> None:
    train = node("nodes_train", "TrainLoraNode")
    if "bypass_mode" not in inspect.signature(getattr(train, "execute", len)).parameters:
        pytest.skip("this ComfyUI trains otherwise")
    settings = {name: [value] for name, value in {**SETTINGS, "bypass_mode": bypass}.items()}
    with torch.inference_mode():  # as the host runs nodes
        lora, losses = train.execute(
            model=[models.extended], latents=[{"samples": noise_of()}], positive=[conditioning()[0]], **settings
        ).result[:2]
    assert len(losses["loss"]) == 2
    trained = [name for name, value in lora.items() if "lora_up" in name and value.any()]
    assert any(".time_stack." in name for name in trained) and any(".transformer_blocks." in name for name in trained)
    assert any(".in_layers." in name for name in trained)
