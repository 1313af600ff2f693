"""What a CPU cannot show: full and partial loading, the dynamic patcher, alternation and half precision on a GPU."""

from __future__ import annotations

import comfy.model_management
import comfy.model_patcher
import pytest
import torch

import svd
from exvideo_core.comfyui.apply.patch import apply_extension

CUDA, CPU = torch.device("cuda", torch.cuda.current_device()), torch.device("cpu")
#: On a simulated card, which a CPU computes, less has to do.
SIMULATED = "simulated" in torch.cuda.get_device_name()


def inputs(dtype: torch.dtype, frames: int = 6 if SIMULATED else 16):
    generator = torch.Generator().manual_seed(2)
    sample = torch.randn(1, frames, 8, 16, 16, generator=generator)
    context = torch.randn(1, 1, svd.CONTEXT, generator=generator)
    return sample.to(CUDA, dtype), context.to(CUDA, dtype), torch.tensor([[29.0, 127.0, 0.02]])


def on_gpu(pair: svd.Pair, dynamic: bool) -> comfy.model_patcher.ModelPatcher:
    kind = comfy.model_patcher.ModelPatcher
    if dynamic:
        kind = comfy.model_patcher.ModelPatcherDynamic
    return kind(pair.base.model, load_device=CUDA, offload_device=CPU)


def call(model, dtype: torch.dtype) -> torch.Tensor:
    sample, context, ids = inputs(dtype)
    model.model.embedder.to(CUDA)
    return svd.call_host(model, sample, 0.7, context, ids.to(CUDA)).cpu()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_no_further_from_the_truth_than_the_reference(dtype: torch.dtype) -> None:
    pair = svd.make_pair(dtype)
    sample, context, ids = inputs(dtype)

    def reference(kind: torch.dtype) -> torch.Tensor:
        unet = pair.reference(kind).to(CUDA)
        with torch.no_grad():
            return unet(sample[0].to(kind), 0.7, context[0].to(kind), ids.to(CUDA)).cpu()

    truth = reference(torch.float32)
    ours = svd.relative_error(call(apply_extension(on_gpu(pair, False), pair.extension), dtype)[0], truth)
    theirs = svd.relative_error(reference(dtype), truth)
    print(f"{dtype}: ours {ours:.2e}, the reference's {theirs:.2e}")
    assert ours < 5e-5 if dtype == torch.float32 else ours <= theirs * 1.05


@pytest.mark.parametrize("dynamic", [False, True])
def test_alternation_on_the_gpu(dynamic: bool, request: pytest.FixtureRequest) -> None:
    pair = svd.make_pair(torch.float16)
    if dynamic:  # not before: with dynamic VRAM the host makes models without weights
        request.getfixturevalue("dynamic_vram")
    base = on_gpu(pair, dynamic)
    patched = apply_extension(base, pair.extension)
    plain, extended = call(base, torch.float16), call(patched, torch.float16)
    assert not plain.equal(extended)
    for model, expected in ((base, plain), (patched, extended)) * 3:
        assert call(model, torch.float16).equal(expected)
    convolution = patched.model.diffusion_model.middle_block[1].positional_conv
    assert dynamic or convolution.weight.device.type == "cuda"
    comfy.model_management.unload_all_models()
    assert call(base, torch.float16).equal(plain)
    assert call(patched, torch.float16).equal(extended)


@pytest.mark.parametrize("part", [0.0, 0.4, 0.8])
def test_partial_loading_on_the_gpu(part: float, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = svd.make_pair(torch.float16)
    patched = apply_extension(on_gpu(pair, False), pair.extension)
    expected = call(patched, torch.float16)
    patched.partially_unload(CPU, int((1 - part) * patched.loaded_size()))
    assert patched.loaded_size() < patched.model_size()
    # There is room for all of it: the host would load the rest again.
    monkeypatch.setattr(comfy.model_management, "load_models_gpu", lambda models: None)
    error = svd.relative_error(call(patched, torch.float16), expected)
    assert error < 2e-3


@pytest.mark.parametrize("offload", [False, True])
def test_a_call_keeps_to_its_estimate_and_its_result(offload: bool) -> None:
    """The memory that the host is told of covers what a call takes, with skip tensors on the card or off it."""
    from exvideo_core.comfyui.low_memory.chunked_unet import with_memory_settings
    from exvideo_core.comfyui.low_memory.estimate import MemorySettings

    dtype = torch.float16
    pair = svd.make_pair(dtype)
    patched = apply_extension(on_gpu(pair, False), pair.extension)
    whole = call(with_memory_settings(patched, MemorySettings(chunk_megabytes=8192)), dtype)
    settings = MemorySettings(chunk_megabytes=4, offload_skips=offload)
    bounded = with_memory_settings(patched, settings)
    assert svd.relative_error(call(bounded, dtype), whole) < 8 * torch.finfo(dtype).eps
    frames, size = (16, 32) if SIMULATED else (128, 64)
    generator = torch.Generator().manual_seed(5)
    sample = torch.randn(1, frames, 8, size, size, generator=generator).to(CUDA, dtype)
    context = torch.randn(1, 1, svd.CONTEXT, generator=generator).to(CUDA, dtype)
    ids = torch.tensor([[29.0, 127.0, 0.02]]).to(CUDA)
    comfy.model_management.load_models_gpu([bounded])
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = svd.call_host(bounded, sample, 0.7, context, ids)
    needed = settings.required_bytes([frames, 4, size, size], 64, dtype.itemsize, CUDA)
    assert torch.cuda.max_memory_allocated() - before < needed
    if not SIMULATED:  # a CPU takes minutes for half precision without chunks
        unchunked = with_memory_settings(patched, MemorySettings(chunk_megabytes=8192))
        expected = svd.call_host(unchunked, sample, 0.7, context, ids)
        assert svd.relative_error(result, expected) < 8 * torch.finfo(dtype).eps


def test_offloaded_skips_arrive_in_time() -> None:
    """Copies run beside the computation: over many calls, none is read before it is there."""
    from exvideo_core.comfyui.low_memory.chunked_unet import with_memory_settings
    from exvideo_core.comfyui.low_memory.estimate import MemorySettings

    dtype = torch.float16
    pair = svd.make_pair(dtype)
    patched = apply_extension(on_gpu(pair, False), pair.extension)
    kept = call(with_memory_settings(patched, MemorySettings(chunk_megabytes=1)), dtype)
    away = with_memory_settings(patched, MemorySettings(chunk_megabytes=1, offload_skips=True))
    for _ in range(2 if SIMULATED else 20):
        assert call(away, dtype).equal(kept)
