"""The patch as a citizen of the host: alternation, strength, LoRAs, accounting, partial loading, errors."""

from __future__ import annotations

import dataclasses

import comfy.model_management
import pytest
import torch
from safetensors.torch import save_file

import svd
from exvideo_core.comfyui.apply.create import untrained_extension
from exvideo_core.comfyui.apply.patch import apply_extension
from exvideo_core.comfyui.checkpoint.load import load_checkpoint
from exvideo_core.comfyui.low_memory.chunked_unet import with_memory_settings
from exvideo_core.comfyui.low_memory.estimate import MemorySettings
from exvideo_core.files.safetensors_header import ModelFileError
from exvideo_core.method.extension import Extension

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def base(small_models):
    return load_checkpoint(str(small_models[0]))[0]


@pytest.fixture(scope="module")
def extension(small_models):
    return Extension.load(small_models[1])


def call(model, frames: int = 6, height: int = 8, width: int = 8) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    sample = torch.randn(1, frames, 8, height, width, generator=generator)
    context = torch.randn(1, 1, 64, generator=generator)
    return svd.call_host(model, sample, 0.5, context, torch.tensor([[29.0, 127.0, 0.02]]))


def test_clones_alternate_to_the_bit(base, extension) -> None:
    plain = call(base)
    patched_model = apply_extension(base, extension)
    half_model = apply_extension(base, extension, strength=0.5)
    patched, half = call(patched_model), call(half_model)
    assert not patched.equal(plain) and not half.equal(patched)
    for model, expected in ((base, plain), (patched_model, patched), (half_model, half)) * 3:
        assert call(model).equal(expected)
    for model, expected in ((half_model, half), (base.clone(), plain), (patched_model.clone(), patched), (base, plain)):
        assert call(model).equal(expected)


def test_an_error_in_a_run_leaves_both_as_they_were(base, extension) -> None:
    plain = call(base)
    patched_model = apply_extension(base, extension)
    patched = call(patched_model)
    with pytest.raises(ValueError, match="129 frames.*trained for 128"):
        call(patched_model, frames=129)
    assert call(base).equal(plain)
    assert call(patched_model).equal(patched)


@pytest.mark.parametrize("frames", [6, 140])
def test_strength_zero_is_the_unpatched_host(base, extension, frames: int) -> None:
    """Of any length, and computed in chunks like every other strength."""
    unchanged = apply_extension(base, extension, strength=0.0)
    assert svd.relative_error(call(unchanged, frames), call(base, frames)) < 5e-5  # rounding: in chunks, and at once
    assert svd.relative_error(call(with_memory_settings(unchanged, MemorySettings(1, True))), call(base)) < 5e-5
    assert unchanged.model_size() == apply_extension(base, extension).model_size()


def test_a_vanishing_strength_tends_to_the_unpatched_host(base, extension) -> None:
    assert svd.relative_error(call(apply_extension(base, extension, strength=1e-7)), call(base)) < 1e-4
    assert svd.relative_error(call(apply_extension(base, extension, strength=0.5)), call(base)) > 1e-2


@pytest.mark.parametrize("mode", ["stretch", "repeat"])
def test_positions_beyond_the_trained_length(base, extension, mode) -> None:
    """As an extension that was trained for 140 frames with these positions."""
    if mode == "repeat":  # up to the last of 128 rows, then down again
        low = torch.tensor([*range(128), *range(126, 114, -1)])
        high, share = low, torch.zeros(140, 1)
    else:
        rows = torch.linspace(0, 127, 140)
        low, high, share = rows.floor().long(), rows.ceil().long(), rows.frac()[:, None]
    blocks = tuple(
        dataclasses.replace(
            block, positions=torch.lerp(block.positions[low].float(), block.positions[high].float(), share).half()
        )
        for block in extension.blocks
    )
    expected = call(apply_extension(base, Extension("140 frames", blocks)), frames=140)
    assert svd.relative_error(call(apply_extension(base, extension, positions=mode), frames=140), expected) < 1e-5


@pytest.mark.parametrize(("frames", "height", "width"), [(1, 8, 8), (5, 2, 2), (2, 4, 16), (3, 9, 7)])
def test_any_size(base, extension, frames, height, width) -> None:
    """An extension that changes nothing changes nothing at any size, and another one does."""
    expected = call(base, frames, height, width)
    untrained = apply_extension(base, untrained_extension(base, 6))
    # Group norms of single values, in levels of one pixel, amplify rounding.
    assert svd.relative_error(call(untrained, frames, height, width), expected) < 1e-3
    assert svd.relative_error(call(apply_extension(base, extension), frames, height, width), expected) > 1e-2


def lora_key() -> str:
    return "diffusion_model.input_blocks.4.1.time_stack.0.attn1.to_q.weight"


def test_lora_before_or_after_is_the_same_and_matters(base, extension) -> None:
    shape = base.model.state_dict()[lora_key()].shape
    delta = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    before = base.clone()
    before.add_patches({lora_key(): (delta,)}, 0.7)
    before = apply_extension(before, extension)
    after = apply_extension(base, extension)
    after.add_patches({lora_key(): (delta,)}, 0.7)
    result = call(after)
    assert call(before).equal(result)
    assert svd.relative_error(result, call(apply_extension(base, extension))) > 1e-3
    call(after)
    block = extension.blocks[2]
    expected = block.shared["time_stack.0.attn1.to_q.weight"].float() + 0.7 * delta
    torch.testing.assert_close(after.model.state_dict()[lora_key()].float(), expected, rtol=1e-3, atol=1e-3)


def test_the_host_counts_the_new_weights(base, extension) -> None:
    patched = apply_extension(base, extension)
    convolutions = sum(b.conv_weight.numel() + b.conv_bias.numel() for b in extension.blocks)
    itemsize = base.model.get_dtype().itemsize
    assert patched.model_size() - base.model_size() == convolutions * itemsize
    assert patched.clone().model_size() == patched.model_size()
    call(patched)
    assert patched.loaded_size() == comfy.model_management.module_size(patched.model)
    call(base)
    assert base.loaded_size() == comfy.model_management.module_size(base.model)


@pytest.mark.parametrize("part", [0.0, 0.3, 0.8])
def test_partial_loading_computes_the_same(base, extension, part) -> None:
    patched = apply_extension(base, extension)
    expected = call(patched)
    comfy.model_management.unload_all_models()
    patched.patch_model(CPU, lowvram_model_memory=max(1, int(part * patched.model_size())))
    try:
        assert patched.model.model_lowvram
        generator = torch.Generator().manual_seed(1)
        sample = torch.randn(6, 8, 8, 8, generator=generator)
        context = torch.randn(1, 1, 64, generator=generator)
        ids = patched.model.embedder(torch.tensor([29.0, 127.0, 0.02])).flatten()[None]
        with torch.no_grad():
            result = patched.model.diffusion_model(
                sample, torch.full((6,), 0.5), context=context.expand(6, -1, -1), y=ids.expand(6, -1),
                num_video_frames=6, transformer_options={},
            )  # fmt: skip
        torch.testing.assert_close(result[None], expected, rtol=1e-4, atol=1e-5)
    finally:
        patched.detach()
    assert call(patched).equal(expected)


def test_one_extension_to_a_model(base, extension) -> None:
    with pytest.raises(ValueError, match="already has the extension 'exvideo_small_random_128f.safetensors'"):
        apply_extension(apply_extension(base, extension), extension)


def test_extension_of_another_width(extension) -> None:
    wide = svd.make_pair().base
    with pytest.raises(ValueError, match="does not fit this model"):
        apply_extension(wide, extension)
    assert not wide.patches and not wide.object_patches


def test_a_model_that_is_no_svd(extension) -> None:
    class Patcher:
        model = torch.nn.Identity()

    with pytest.raises(ValueError, match="Identity.*SVD"):
        apply_extension(Patcher(), extension)


def test_attention_patches_of_the_user_still_apply(base, extension) -> None:
    patched = apply_extension(base, extension)
    seen = []
    patched.set_model_attn2_patch(lambda q, k, v, options: (seen.append(options["block"]), (q, k, v))[1])
    comfy.model_management.load_models_gpu([patched])
    options = patched.model_options["transformer_options"]
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        patched.model.diffusion_model(
            torch.randn(2, 8, 8, 8, generator=generator), torch.full((2,), 0.5), context=torch.randn(2, 1, 64),
            y=torch.randn(2, 768), num_video_frames=2, transformer_options=options,
        )  # fmt: skip
    assert len(seen) == 32  # spatial and temporal cross-attention of 16 transformers


def test_checkpoints_that_are_none(tmp_path, small_models) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(1)}, path)
    with pytest.raises(ModelFileError, match="not a Stable Video Diffusion"):
        load_checkpoint(str(path))
    path.write_bytes(small_models[0].read_bytes()[:100_000])
    with pytest.raises(ModelFileError, match="truncated"):
        load_checkpoint(str(path))
    with pytest.raises(ModelFileError, match="not a .safetensors"):
        load_checkpoint(str(tmp_path / "model.ckpt"))
