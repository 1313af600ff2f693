"""Untrained extensions from a host's model, and the same model on diffusers."""

from __future__ import annotations

import os
import subprocess

import pytest
import torch
from safetensors.torch import load_file, save_file

import svd
from exvideo_core.comfyui.apply.create import untrained_extension
from exvideo_core.comfyui.apply.patch import apply_extension
from exvideo_core.comfyui.checkpoint.load import load_checkpoint
from exvideo_core.method import tensor_names
from exvideo_core.method.extension import Extension
from exvideo_core.method.positions import sinusoidal
from runner.environment import own_python
from runner.hosts import PACK
from small_model import recipe


@pytest.fixture(scope="module")
def base(small_models):
    return load_checkpoint(str(small_models[0]))[0]


def inputs(frames: int, channels: int = 8):
    generator = torch.Generator().manual_seed(3)
    sample = torch.randn(1, frames, channels, 8, 8, generator=generator)
    return sample, torch.randn(1, 1, 64, generator=generator), torch.tensor([[29.0, 100.0, 0.02]])


def test_untrained_holds_the_base_whatever_is_loaded_or_patched(base, small_models) -> None:
    """The weights of the checkpoint, though a LoRA and another extension were patched into the modules just now."""
    stored = load_file(small_models[0])
    key = "diffusion_model.input_blocks.4.1.time_stack.0.attn1.to_q.weight"
    changed = base.clone()
    changed.add_patches({key: (torch.ones_like(base.model.state_dict()[key]),)}, 1.0)
    sample, context, ids = inputs(4)
    svd.call_host(apply_extension(changed, Extension.load(small_models[1])), sample, 0.5, context, ids)
    extension = untrained_extension(changed, 30)
    for name, block in zip(tensor_names.SVD_TRANSFORMERS, extension.blocks, strict=True):
        for tensor, value in block.shared.items():
            expected = stored[f"model.diffusion_model.{name}.{tensor}"]
            assert value.float().equal(expected.float()), (name, tensor)
        channels = block.conv_bias.shape[0]
        assert block.positions[:25].equal(sinusoidal(torch.arange(25), channels))
        assert block.positions[29].equal(block.positions[19])  # ping-pong: 25 -> 23, 26 -> 22, ... 29 -> 19
        moved = torch.nn.functional.conv3d(torch.ones(1, channels, 3, 3, 3), block.conv_weight.float())
        assert moved.eq(1).all()


def test_untrained_changes_nothing_within_the_bases_length(base) -> None:
    sample, context, ids = inputs(25)
    plain = svd.call_host(base, sample, 0.5, context, ids)
    extended = svd.call_host(apply_extension(base, untrained_extension(base, 40)), sample, 0.5, context, ids)
    # An identity convolution rounds: as far as the host and the reference round apart, too.
    assert svd.relative_error(extended, plain) < 1e-4


def test_saved_and_loaded_to_the_bit(base, tmp_path) -> None:
    extension = untrained_extension(base, 30)
    extension.save(tmp_path / "made.safetensors", torch.float32)
    again = Extension.load(tmp_path / "made.safetensors")
    ours, theirs = extension.tensors(torch.float32), again.tensors()
    assert ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in ours)


_DIFFUSERS = """
import sys, torch
from safetensors.torch import load_file, save_file
from exvideo_core.method.extension import Extension
from exvideo_core.diffusers import checkpoint, patch
base, extension, given, out = sys.argv[1:]
svd = checkpoint.load(base)
unet = svd.unet
patch.apply(unet, Extension.load(extension))
t = load_file(given)
with torch.no_grad():
    out_ = unet(t["sample"], torch.tensor([0.5]), t["context"], t["ids"], return_dict=False)[0]
    vae = svd.vae
    pixels = vae.decode(t["latents"] / vae.config.scaling_factor, num_frames=len(t["latents"])).sample
save_file({"out": out_.contiguous(), "pixels": pixels.contiguous()}, out)
"""


def test_diffusers_computes_what_the_host_computes(tmp_path) -> None:
    """The shipped model and extension, float32: one UNet call and one decoding, on diffusers in its own Python."""
    sample, context, ids = inputs(128)
    latents = torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(4))
    model, _, vae = load_checkpoint(str(recipe.CHECKPOINT))
    model.model.diffusion_model.float()
    model.model.diffusion_model.dtype = torch.float32
    model.model.manual_cast_dtype = None
    ours = svd.call_host(apply_extension(model, Extension.load(recipe.EXTENSION)), sample, 0.5, context, ids)
    save_file({"sample": sample, "context": context, "ids": ids, "latents": latents}, tmp_path / "in.safetensors")
    environment = {**os.environ, "PYTHONPATH": str(PACK)}
    files = [recipe.CHECKPOINT, recipe.EXTENSION, tmp_path / "in.safetensors", tmp_path / "out.safetensors"]
    subprocess.run([own_python(), "-c", _DIFFUSERS, *files], check=True, env=environment)
    theirs = load_file(tmp_path / "out.safetensors")
    error = svd.relative_error(ours, theirs["out"])
    print(f"relative error {error:.2e}")
    assert error < 1e-4
    pixels = (theirs["pixels"].movedim(1, -1) / 2 + 0.5).clamp(0, 1)
    assert svd.relative_error(vae.decode(latents / 0.18215), pixels) < 1e-3
