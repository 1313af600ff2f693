"""Bounded memory: chunked calls compute the same, skip tensors may wait elsewhere, and the host is told the truth."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import comfy.model_management
import comfy.model_patcher
import comfy.sampler_helpers
import pytest
import torch

import svd
from exvideo_core import chunks
from exvideo_core.hosts.comfyui.memory import MemorySettings
from exvideo_core.hosts.comfyui.patch import apply_extension, with_memory
from exvideo_core.hosts.comfyui.resblock import BoundedDownsample, BoundedResBlock, BoundedUpsample
from exvideo_core.hosts.comfyui.transformer import ExtendedVideoTransformer
from exvideo_core.skips import Joined, Skip

FRAMES, HEIGHT, WIDTH = 7, 12, 20
#: One frame or row at a time, odd numbers of them, and more than there is.
BUDGETS = [chunks.Budget(size) for size in (1, 300_001, 1_000_003)]
WHOLE = chunks.Budget(2**40)


@pytest.fixture(scope="module")
def pair() -> svd.Pair:
    return svd.make_pair()


@pytest.fixture(scope="module")
def patched(pair: svd.Pair) -> comfy.model_patcher.ModelPatcher:
    model = apply_extension(pair.base, pair.extension)
    comfy.model_management.load_models_gpu([model])
    return model


def inputs(clips: int, height: int = HEIGHT, width: int = WIDTH, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(3)
    sample = torch.randn(clips, FRAMES, 8, height, width, generator=generator).to(dtype)
    context = torch.randn(clips, 1, svd.CONTEXT, generator=generator).to(dtype)
    return sample, context, torch.tensor([[29.0, 127.0, 0.02], [6.0, 40.0, 0.1]])[:clips]


def call_within(budget: chunks.Budget, model, clips: int, monkeypatch, dtype=torch.float32, **size) -> torch.Tensor:
    monkeypatch.setattr(MemorySettings, "budget", lambda self, device: budget)
    sample, context, ids = inputs(clips, dtype=dtype, **size)
    return svd.call_host(model, sample, 0.7, context, ids)


def layers(model) -> Iterator[tuple[str, Callable[[], torch.Tensor]]]:
    """Calls of every kind of layer on random tensors, two clips long."""
    count = 2 * FRAMES
    unet = model.model.diffusion_model
    generator = torch.Generator().manual_seed(4)
    emb = torch.randn(count, 4 * 64, generator=generator)
    context = torch.randn(2, 1, svd.CONTEXT, generator=generator).repeat_interleave(FRAMES, 0)
    seen = set()
    for name, module in unet.named_modules():
        if isinstance(module, ExtendedVideoTransformer | BoundedResBlock | BoundedUpsample | BoundedDownsample):
            kind = (type(module), module.channels if hasattr(module, "channels") else module.in_channels)
            if kind in seen:
                continue
            seen.add(kind)
            x = torch.randn(count, kind[1], HEIGHT, WIDTH, generator=generator)
            if isinstance(module, ExtendedVideoTransformer):
                call = lambda m=module, x=x: m(x, context, None, FRAMES, None, {})  # noqa: E731
            elif isinstance(module, BoundedResBlock):
                call = lambda m=module, x=x: m(x, emb, FRAMES, None)  # noqa: E731
            else:
                call = lambda m=module, x=x: m(x)  # noqa: E731
            yield name, call


@torch.no_grad()
def test_every_layer_in_chunks_is_the_layer_at_once(patched) -> None:
    kinds = 0
    for name, call in layers(patched):
        with chunks.use(WHOLE):
            whole = call()
        for budget in BUDGETS:
            with chunks.use(budget):
                error = svd.relative_error(call(), whole)
            assert error < 1e-6, (name, budget, error)
        kinds += 1
    assert kinds >= 10


@pytest.mark.parametrize("clips", [1, 2])
def test_a_call_in_chunks_is_the_call_at_once(patched, clips, monkeypatch) -> None:
    """A hundred layers one after the other: what rounds differently at 1e-7 grows to some 1e-6."""
    whole = call_within(WHOLE, patched, clips, monkeypatch)
    for budget in BUDGETS:
        error = svd.relative_error(call_within(budget, patched, clips, monkeypatch), whole)
        print(f"{budget}: {error:.1e}")
        assert error < 5e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_in_chunks(dtype, monkeypatch) -> None:
    half = svd.make_pair(dtype)
    model = apply_extension(half.base, half.extension)
    whole = call_within(WHOLE, model, 1, monkeypatch, dtype)
    parts = call_within(BUDGETS[1], model, 1, monkeypatch, dtype)
    assert parts.isfinite().all()
    assert svd.relative_error(parts, whole) < 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_128_frames_in_half_precision_stay_finite(dtype) -> None:
    half = svd.make_pair(dtype)
    generator = torch.Generator().manual_seed(5)
    sample = torch.randn(1, 128, 8, 8, 8, generator=generator)
    context, ids = inputs(1)[1:]
    model = apply_extension(half.base, half.extension)
    found = svd.call_host(model, sample.to(dtype), 0.7, context.to(dtype), ids)
    assert found.isfinite().all()
    whole = svd.make_pair(torch.float32)
    expected = svd.call_host(apply_extension(whole.base, whole.extension), sample, 0.7, context, ids)
    assert svd.relative_error(found, expected) < 4 * torch.finfo(dtype).eps


def test_offloaded_skips_change_nothing(patched, monkeypatch) -> None:
    kept = call_within(BUDGETS[1], patched, 1, monkeypatch)
    away = chunks.Budget(BUDGETS[1].chunk_bytes, offload_skips=True)
    assert call_within(away, patched, 1, monkeypatch).equal(kept)


def test_skips_are_joined_chunk_by_chunk() -> None:
    parts = [torch.randn(5, 3, 2, 2), torch.randn(5, 4, 2, 2)]
    joined = torch.cat([parts[0], Skip(parts[1], offload=True)], dim=1)
    assert isinstance(joined, Joined)
    assert joined.shape == (5, 7, 2, 2)
    spans = [(0, 2), (2, 5)]
    found = torch.cat(list(joined.chunks(spans)))
    assert found.equal(torch.cat(parts, dim=1))


def test_a_users_output_patch_sees_tensors(patched, monkeypatch) -> None:
    """FreeU and others scale skip tensors: what they get has to be one."""
    seen = []

    def scale(h, skip, options):  # noqa: ANN001, ANN202
        seen.append(type(skip))
        return h, skip * 1.5

    model = patched.clone()
    model.set_model_output_block_patch(scale)
    changed = call_within(BUDGETS[2], model, 1, monkeypatch)
    assert set(seen) == {torch.Tensor} and len(seen) == 12
    assert svd.relative_error(changed, call_within(BUDGETS[2], patched, 1, monkeypatch)) > 1e-3


def test_an_attention_override_sees_every_attention(patched, monkeypatch) -> None:
    calls = []

    def override(attention, *arguments, **named):  # noqa: ANN001, ANN202
        calls.append(1)
        return attention(*arguments, **named)

    plain = call_within(WHOLE, patched, 1, monkeypatch)
    model = patched.clone()
    model.model_options["transformer_options"]["optimized_attention_override"] = override
    result = call_within(WHOLE, model, 1, monkeypatch)
    assert len(calls) == 16 * 4  # self and cross, spatial and temporal
    assert svd.relative_error(result, plain) < 5e-6


def test_without_the_shortcut_it_is_the_same(patched, monkeypatch) -> None:
    """A context of the same token twice has two keys, so that cross-attention is really computed."""
    sample, context, ids = inputs(1)
    monkeypatch.setattr(MemorySettings, "budget", lambda self, device: BUDGETS[1])
    one = svd.call_host(patched, sample, 0.7, context, ids)
    two = svd.call_host(patched, sample, 0.7, context.expand(-1, 2, -1), ids)
    assert svd.relative_error(two, one) < 5e-6


def test_the_host_is_told_what_a_call_needs(pair) -> None:
    """While models are loaded: one condition's need, not the host's guess; and no trace of it afterwards."""
    model = apply_extension(pair.base, pair.extension)
    model = with_memory(model, MemorySettings(chunk_megabytes=16))
    told: list[float] = []
    keep = comfy.model_management.load_models_gpu

    def load(models, memory_required=0, minimum_memory_required=None, **rest):  # noqa: ANN001, ANN202
        told.append(memory_required)
        told.append(minimum_memory_required)
        return keep(models, memory_required=0)

    shape = [128, 4, 64, 64]
    comfy.model_management.load_models_gpu([pair.base])
    before = pair.base.model.memory_required(shape)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comfy.model_management, "load_models_gpu", load)
        options = comfy.model_patcher.create_model_options_clone(model.model_options)
        options["transformer_options"]["wrappers"] = model.wrappers
        comfy.sampler_helpers.prepare_sampling(model, shape, {"positive": []}, model_options=options)
    area = 128 * 64 * 64 * 64 * 4  # frames x pixels x width x bytes
    for value in told:
        assert 6 * area < value < 8 * area + 2**27
    # Two conditions never share a batch on a CPU, and other models are estimated as ever.
    assert model.model.memory_required([256, 4, 64, 64]) == math.inf
    comfy.model_management.load_models_gpu([pair.base])
    assert pair.base.model.memory_required(shape) == before


def test_settings_want_an_extension(pair) -> None:
    with pytest.raises(ValueError, match="ExVideo Apply"):
        with_memory(pair.base, MemorySettings())
