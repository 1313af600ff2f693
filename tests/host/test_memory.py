"""Bounded memory: chunked calls compute the same, skip tensors may wait elsewhere, and the host is told the truth."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from unittest import mock

import comfy.model_management
import comfy.model_patcher
import comfy.sampler_helpers
import pytest
import torch
from comfy.patcher_extension import WrappersMP

import svd
from exvideo_core.comfyui.apply.patch import apply_extension
from exvideo_core.comfyui.apply.transformer import ExtendedVideoTransformer
from exvideo_core.comfyui.low_memory.budget import limit_chunks
from exvideo_core.comfyui.low_memory.chunked_unet import with_memory_settings
from exvideo_core.comfyui.low_memory.estimate import MemorySettings
from exvideo_core.comfyui.low_memory.host_buffers import HostBuffers
from exvideo_core.comfyui.low_memory.res_blocks import ChunkedDownsample, ChunkedResBlock, ChunkedUpsample
from exvideo_core.comfyui.low_memory.skip_connections import LazyConcat, SkipConnection

FRAMES, HEIGHT, WIDTH = 7, 12, 20
#: One frame or row at a time, odd numbers of them, and more than there is.
CHUNK_BYTES = (1, 300_001, 1_000_003)
WHOLE = 2**40


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


def call_within(chunk_bytes: int, model, clips: int, monkeypatch, dtype=torch.float32, **size) -> torch.Tensor:
    monkeypatch.setattr(MemorySettings, "chunk_bytes", lambda self, device: chunk_bytes)
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
        if isinstance(module, ExtendedVideoTransformer | ChunkedResBlock | ChunkedUpsample | ChunkedDownsample):
            kind = (type(module), module.channels if hasattr(module, "channels") else module.in_channels)
            if kind in seen:
                continue
            seen.add(kind)
            x = torch.randn(count, kind[1], HEIGHT, WIDTH, generator=generator)
            if isinstance(module, ExtendedVideoTransformer):
                call = lambda m=module, x=x: m(x, context, None, FRAMES, None, {})  # noqa: E731
            elif isinstance(module, ChunkedResBlock):
                call = lambda m=module, x=x: m(x, emb, FRAMES, None)  # noqa: E731
            else:
                call = lambda m=module, x=x: m(x)  # noqa: E731
            yield name, call


@torch.no_grad()
def test_every_layer_in_chunks_is_the_layer_at_once(patched) -> None:
    kinds = 0
    for name, call in layers(patched):
        with limit_chunks(WHOLE):
            whole = call()
        for chunk_bytes in CHUNK_BYTES:
            with limit_chunks(chunk_bytes):
                error = svd.relative_error(call(), whole)
            assert error < 1e-6, (name, chunk_bytes, error)
        kinds += 1
    assert kinds >= 10


@pytest.mark.parametrize("clips", [1, 2])
def test_a_call_in_chunks_is_the_call_at_once(patched, clips, monkeypatch) -> None:
    """A hundred layers one after the other: what rounds differently at 1e-7 grows to some 1e-6."""
    whole = call_within(WHOLE, patched, clips, monkeypatch)
    for chunk_bytes in CHUNK_BYTES:
        error = svd.relative_error(call_within(chunk_bytes, patched, clips, monkeypatch), whole)
        print(f"{chunk_bytes}: {error:.1e}")
        assert error < 5e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_in_chunks(dtype, monkeypatch) -> None:
    half = svd.make_pair(dtype)
    model = apply_extension(half.base, half.extension)
    whole = call_within(WHOLE, model, 1, monkeypatch, dtype)
    parts = call_within(CHUNK_BYTES[1], model, 1, monkeypatch, dtype)
    assert svd.relative_error(parts, whole) < 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [pytest.param(torch.float16, marks=pytest.mark.nightly), torch.bfloat16])
def test_128_frames_in_half_precision_match_float32(dtype) -> None:
    half = svd.make_pair(dtype)
    generator = torch.Generator().manual_seed(5)
    sample = torch.randn(1, 128, 8, 8, 8, generator=generator)
    context, ids = inputs(1)[1:]
    model = apply_extension(half.base, half.extension)
    found = svd.call_host(model, sample.to(dtype), 0.7, context.to(dtype), ids)
    whole = svd.make_pair(torch.float32)
    expected = svd.call_host(apply_extension(whole.base, whole.extension), sample, 0.7, context, ids)
    assert svd.relative_error(found, expected) < 4 * torch.finfo(dtype).eps


def test_offloaded_skips_change_nothing(patched, monkeypatch) -> None:
    kept = call_within(CHUNK_BYTES[1], patched, 1, monkeypatch)
    away = with_memory_settings(patched, MemorySettings(offload_skips=True))
    for _ in range(2):  # the second time in the buffers of the first
        assert call_within(CHUNK_BYTES[1], away, 1, monkeypatch).equal(kept)


def test_buffers_of_skips_are_used_again_pinned_once_and_given_back() -> None:
    pinned: list[int] = []

    def pin(buffer: torch.Tensor) -> bool:
        pinned.append(buffer.data_ptr())
        return True

    buffers = HostBuffers(pin, lambda buffer: pinned.remove(buffer.data_ptr()))
    like = torch.randn(2, 3, 4, 5, dtype=torch.float16).contiguous(memory_format=torch.channels_last)
    places = set()
    for _ in range(3):
        buffers.begin()
        first, second = buffers.take(like), buffers.take(like[:1])
        assert first.shape == like.shape and first.stride() == like.stride() and first.dtype == like.dtype
        first.fill_(1)
        second.fill_(2)
        assert first.eq(1).all()
        places.add((first.data_ptr(), second.data_ptr()))
    assert len(places) == 1 and len(pinned) == 2
    buffers.begin()
    assert buffers.take(torch.zeros(7)).shape == (7,)
    assert len(pinned) == 2
    buffers.release()
    assert pinned == []


def test_skips_are_joined_chunk_by_chunk() -> None:
    parts = [torch.randn(5, 3, 2, 2), torch.randn(5, 4, 2, 2)]
    joined = torch.cat([parts[0], SkipConnection(parts[1], HostBuffers(lambda buffer: False, id))], dim=1)
    assert isinstance(joined, LazyConcat)
    assert joined.shape == (5, 7, 2, 2)
    spans = [(0, 2), (2, 5)]
    found = torch.cat(list(joined.read_chunks(spans)))
    assert found.equal(torch.cat(parts, dim=1))


def test_a_users_output_patch_sees_tensors(patched, monkeypatch) -> None:
    """FreeU and others scale skip tensors: what they get has to be one."""
    seen = []

    def scale(h, skip, options):  # noqa: ANN001, ANN202
        seen.append(type(skip))
        return h, skip * 1.5

    model = patched.clone()
    model.set_model_output_block_patch(scale)
    changed = call_within(CHUNK_BYTES[2], model, 1, monkeypatch)
    assert set(seen) == {torch.Tensor} and len(seen) == 12
    assert svd.relative_error(changed, call_within(CHUNK_BYTES[2], patched, 1, monkeypatch)) > 1e-3


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
    monkeypatch.setattr(MemorySettings, "chunk_bytes", lambda self, device: CHUNK_BYTES[1])
    one = svd.call_host(patched, sample, 0.7, context, ids)
    two = svd.call_host(patched, sample, 0.7, context.expand(-1, 2, -1), ids)
    assert svd.relative_error(two, one) < 5e-6


def test_the_host_is_told_what_a_call_needs(pair) -> None:
    """While models are loaded: one condition's need, not the host's guess; and no trace of it afterwards."""
    model = apply_extension(pair.base, pair.extension)
    model = with_memory_settings(model, MemorySettings(chunk_megabytes=16))
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
    assert len(told) >= 2
    comfy.model_management.load_models_gpu([model])
    for patcher in (pair.base, model):
        assert "memory_required" not in vars(patcher.model)
        assert patcher.model.memory_required(shape) == before


def guided_by_both(model):
    """With a patch that tells conditions apart."""
    changed = model.clone()
    changed.set_model_attn1_output_patch(lambda out, options: out if options["cond_or_uncond"] else -out)
    return changed


@pytest.mark.parametrize(
    ("device", "frames", "change", "together"),
    [
        ("cpu", 4, lambda model: model, False),
        ("cpu", 128, guided_by_both, True),
        ("cuda", 4, lambda model: model, True),
        ("cuda", 128, lambda model: model, False),
        ("cuda", 128, guided_by_both, True),
    ],
)
def test_conditions_share_a_batch_by_size_or_need_not_by_free_memory(pair, device, frames, change, together) -> None:
    model = change(apply_extension(pair.base, pair.extension))
    wrappers = model.get_wrappers(WrappersMP.CALC_COND_BATCH, "exvideo")
    x = torch.empty(frames, 4, 64, 64, device="meta")
    x = mock.Mock(device=torch.device(device), shape=x.shape)

    def executor(base, conds, x, timestep, options):  # noqa: ANN001, ANN202
        return base.memory_required([2 * frames, *x.shape[1:]])

    (wrapper,) = wrappers
    assert wrapper(executor, model.model, [], x, None, model.model_options) == (0.0 if together else math.inf)
    assert "memory_required" not in vars(model.model)


def told_of(model, conds=None) -> float:
    """What the host is told of 128 frames of 512x512."""
    (wrapper,) = model.get_wrappers(WrappersMP.PREPARE_SAMPLING, "exvideo")
    shape = [128, 4, 64, 64]
    ask = lambda patcher, *_, **__: patcher.model.memory_required([2 * shape[0], *shape[1:]])  # noqa: E731
    return wrapper(ask, model, shape, conds or {}, model_options=model.model_options)


def test_the_host_is_told_of_what_other_nodes_take(pair, caplog) -> None:
    """More where somebody sees whole blocks or skip tensors; the figures themselves are those of `bench patches`."""
    caplog.set_level("INFO")
    model = apply_extension(pair.base, pair.extension)
    area = 128 * 64 * 64 * 64 * 4 * 1.1
    plain = told_of(model)

    def patched(setter: str, *given: object) -> comfy.model_patcher.ModelPatcher:
        changed = model.clone()
        getattr(changed, setter)(*given)
        return changed

    assert told_of(patched("set_model_attn1_replace", lambda q, k, v, options: v, "middle", 0)) == plain
    assert not [line for line in caplog.messages if "whole transformer blocks" in line]
    whole = told_of(patched("set_model_attn1_output_patch", lambda out, options: out))
    assert whole == pytest.approx(plain + 20 * area)
    (line,) = [line for line in caplog.messages if "whole transformer blocks" in line]
    assert f"{whole / 2**30:.1f} GB" in line
    skips = told_of(patched("set_model_output_block_patch", lambda h, skip, options: (h, skip)))
    assert skips == pytest.approx(plain + 8 * area)
    controlled = {"positive": [{"control": object()}]}
    assert told_of(model, controlled) == pytest.approx(plain + 2 * area)
    away = with_memory_settings(model, MemorySettings(offload_skips=True))
    assert told_of(away) == pytest.approx(plain - 3 * area)
    assert told_of(away, controlled) == told_of(model, controlled)
    assert told_of(guided_by_both(model)) == pytest.approx(told_of(model) + (6 + 2 * 20) * area)


def test_patches_that_can_be_cut_see_all_conditions_of_some_frames(pair, monkeypatch) -> None:
    """Normalized Attention Guidance, chunk by chunk, is what it is at once."""
    nag = pytest.importorskip("comfy_extras.nodes_nag").NAGuidance
    model = nag.execute(apply_extension(pair.base, pair.extension), 5.0, 0.5, 1.5)[0]
    model.model_options["transformer_options"]["cond_or_uncond"] = [1, 0]
    whole = call_within(WHOLE, model, 2, monkeypatch)
    plain = call_within(WHOLE, apply_extension(pair.base, pair.extension), 2, monkeypatch)
    assert svd.relative_error(whole, plain) > 1e-2
    for chunk_bytes in CHUNK_BYTES:
        assert svd.relative_error(call_within(chunk_bytes, model, 2, monkeypatch), whole) < 5e-6


def test_chunks_follow_the_card_and_not_what_is_free_of_it(monkeypatch) -> None:
    card = torch.device("cuda", 0)
    found = []
    for gigabytes in (6, 8, 12, 16, 24, 80):
        monkeypatch.setattr(comfy.model_management, "get_total_memory", lambda device, g=gigabytes: g * 10**9)
        found.append(MemorySettings().chunk_bytes(card) // 2**20)
    assert found == [128, 128, 256, 256, 512, 512]
    assert MemorySettings(chunk_megabytes=7).chunk_bytes(card) == 7 * 2**20


def test_settings_want_an_extension(pair) -> None:
    with pytest.raises(ValueError, match="ExVideo Apply"):
        with_memory_settings(pair.base, MemorySettings())
