"""SVD as a single file and as a diffusers folder: both ways, exact, and clear errors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from exvideo_core.diffusers import checkpoint, patch
from exvideo_core.files.safetensors_header import ModelFileError, read_header
from exvideo_core.method.extension import Extension
from exvideo_core.post_tuning.selection import untrained


def test_file_to_diffusers_and_back_is_exact(base: Path, tmp_path: Path) -> None:
    stored = load_file(base)
    svd = checkpoint.load(base)
    checkpoint.save(svd, tmp_path / "again.safetensors", torch.float32)
    again = load_file(tmp_path / "again.safetensors")
    assert again.keys() == stored.keys()
    assert all(again[name].equal(stored[name]) for name in stored)

    folder = tmp_path / "diffusers"
    svd.unet.save_pretrained(folder / "unet")
    svd.vae.save_pretrained(folder / "vae")
    svd.image_encoder.save_pretrained(folder / "image_encoder")
    checkpoint.save(checkpoint.load(folder), tmp_path / "third.safetensors", torch.float32)
    third = load_file(tmp_path / "third.safetensors")
    assert all(third[name].equal(stored[name]) for name in stored)


@pytest.mark.parametrize("drop", ["model.diffusion_model.middle_block.1", "first_stage_model.decoder", "conditioner."])
def test_an_incomplete_file_is_named(base: Path, tmp_path: Path, drop: str) -> None:
    path = tmp_path / "part.safetensors"
    kept = {name: value for name, value in load_file(base).items() if not name.startswith(drop)}
    save_file(kept, path, read_header(base).metadata)
    with pytest.raises(ModelFileError, match="part.safetensors.*not a complete SVD"):
        checkpoint.load(path)


def test_a_narrow_file_has_to_tell_its_heads(base: Path, tmp_path: Path) -> None:
    path = tmp_path / "untold.safetensors"
    save_file(load_file(base), path)
    with pytest.raises(ModelFileError, match="num_head_channels"):
        checkpoint.load(path)


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="not a diffusers folder"):
        checkpoint.load(tmp_path)


def test_an_untrained_extension_changes_nothing_and_returns_whole(base: Path) -> None:
    svd = checkpoint.load(base)
    torch.manual_seed(0)
    given = torch.randn(1, 25, 8, 8, 8), torch.tensor([0.5]), torch.randn(1, 1, 32), torch.tensor([[29.0, 127.0, 0.0]])
    with torch.no_grad():
        plain = svd.unet(*given, return_dict=False)[0]
        extension = untrained(svd.unet, 40)
        patch.apply(svd.unet, extension)
        extended = svd.unet(*given, return_dict=False)[0]
    torch.testing.assert_close(extended, plain, rtol=1e-4, atol=1e-4)
    ours, theirs = extension.tensors(), patch.collect(svd.unet).tensors()
    assert all(ours[name].equal(theirs[name]) for name in ours)
    with pytest.raises(ValueError, match="already has an extension"):
        patch.apply(svd.unet, extension)


def test_an_extension_of_other_widths_leaves_the_model_as_it_was(base: Path) -> None:
    svd = checkpoint.load(base)
    before = {name: value.clone() for name, value in svd.unet.state_dict().items()}
    tensors = untrained(svd.unet, 8).tensors()
    wide = {name: torch.cat([value, value]) if name.endswith("conv.bias") else value for name, value in tensors.items()}
    with pytest.raises(ValueError, match="does not fit this model"):
        patch.apply(svd.unet, Extension.from_tensors("wide", wide))
    assert all(before[name].equal(value) for name, value in svd.unet.state_dict().items())
    assert not patch.is_extended(svd.unet)
