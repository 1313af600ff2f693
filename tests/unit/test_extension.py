"""Extension files: the published layout, and every kind of bad file."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from exvideo_core.files.safetensors_header import ModelFileError
from exvideo_core.method import tensor_names
from exvideo_core.method.extension import Extension

WIDTHS = [8] * 16
FULL_WIDTHS = [320, 320, 640, 640, *[1280] * 6, 640, 640, 640, 320, 320, 320]


def tensors(frames: int = 7, widths: list[int] = WIDTHS, dtype: torch.dtype = torch.float16) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {n: torch.randn(s).to(dtype) for n, s in tensor_names.extension_shapes(widths, 6, frames).items()}


def save(content: dict[str, torch.Tensor], path: Path) -> Path:
    save_file(content, path)
    return path


def refused(path: Path, *parts: str) -> None:
    with pytest.raises(ModelFileError) as caught:
        Extension.load(path)
    message = str(caught.value)
    assert path.name in message
    for part in parts:
        assert part in message, message


def test_full_width_layout_is_the_published_one() -> None:
    shapes = tensor_names.extension_shapes(FULL_WIDTHS, 1024, 128)
    assert len(shapes) == 528
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == 832_956_800
    assert tensor_names.layout_md5(shapes) == "9a4ab6869ac9b7d6e31f9854e397c867"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("prefix", ["", "unet.", "_forward_module.unet."])
def test_loads_every_dtype_and_prefix(tmp_path: Path, dtype: torch.dtype, prefix: str) -> None:
    content = tensors(dtype=dtype)
    path = save({prefix + name: value for name, value in content.items()}, tmp_path / "ext.safetensors")
    extension = Extension.load(path)
    assert (extension.frames, extension.widths, extension.context_dim, extension.dtype) == (7, tuple(WIDTHS), 6, dtype)
    block = extension.blocks[2]
    assert block.positions.equal(content["blocks.29.positional_embedding.embeddings"])
    assert block.shared["time_stack.0.norm3.bias"].equal(content["blocks.29.norm_out.bias"])
    assert block.shared["time_stack.0.ff.net.0.proj.weight"].equal(content["blocks.29.act_fn_out.proj.weight"])
    assert len(block.shared) == 30


def test_missing_extra_and_misshaped(tmp_path: Path) -> None:
    content = tensors()
    lacking = {name: value for name, value in content.items() if name != "blocks.83.attn1.to_q.weight"}
    refused(save(lacking, tmp_path / "a.safetensors"), "is missing", "blocks.83.attn1.to_q.weight")
    refused(save({**content, "blocks.8.x": torch.zeros(1)}, tmp_path / "b.safetensors"), "blocks.8.x")
    wrong = {**content, "blocks.7.norm1.weight": torch.zeros(9).half()}
    refused(save(wrong, tmp_path / "c.safetensors"), "blocks.7.norm1.weight", "[9]", "[8]")
    ragged = {**content, "blocks.17.positional_embedding.embeddings": torch.zeros(6, 8).half()}
    refused(save(ragged, tmp_path / "d.safetensors"), "blocks.17.positional_embedding", "[6, 8]", "[7, 8]")


def test_duplicate_through_prefixes_and_in_the_header(tmp_path: Path) -> None:
    content = tensors()
    twice = {**content, "unet.blocks.7.norm1.bias": content["blocks.7.norm1.bias"].clone()}
    refused(save(twice, tmp_path / "a.safetensors"), "twice", "blocks.7.norm1.bias")
    entry = '{"dtype":"F16","shape":[1],"data_offsets":[0,2]}'
    header = f'{{"x":{entry},"x":{entry}}}'.encode()
    path = tmp_path / "b.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0")
    refused(path, "twice")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_values(tmp_path: Path, value: float) -> None:
    content = tensors()
    content["blocks.195.positional_conv.weight"][3, 1, 2, 0, 1] = value
    refused(save(content, tmp_path / "ext.safetensors"), "NaN or infinite", "blocks.195.positional_conv.weight")


def test_integers_are_refused(tmp_path: Path) -> None:
    content = tensors()
    content["blocks.7.norm1.bias"] = torch.zeros(8, dtype=torch.int64)
    refused(save(content, tmp_path / "ext.safetensors"), "I64", "fp16, bf16 or fp32")


@pytest.mark.parametrize("part", [0.9, 0.5, 0.001])
def test_truncated(tmp_path: Path, part: float) -> None:
    path = save(tensors(), tmp_path / "ext.safetensors")
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * part)])
    refused(path, "truncated", "again")


def test_other_kinds_of_file(tmp_path: Path) -> None:
    path = tmp_path / "ext.safetensors"
    torch.save({"a": torch.zeros(2)}, path)
    refused(path, "pickle")
    path.write_bytes(pickle.dumps({"a": 1}))
    refused(path, "pickle")
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    refused(path, "Git LFS")
    path.write_bytes(b"<!DOCTYPE html><html></html>")
    refused(path, "web page")
    path.write_bytes(b"")
    refused(path, "empty")
    path.write_bytes(bytes(range(256)) * 4)
    refused(path, "not a safetensors")
    header = json.dumps({"x": {"dtype": "F16", "shape": "no"}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    refused(path, "corrupted")
    refused(tmp_path / "absent.safetensors", "cannot be read")
    torch.save({}, tmp_path / "extension.pt")
    refused(tmp_path / "extension.pt", "not a .safetensors file")


def test_models_of_another_kind(tmp_path: Path) -> None:
    path = tmp_path / "ext.safetensors"
    zero = torch.zeros(1)
    save({"model.diffusion_model.input_blocks.1.1.time_stack.0.norm1.bias": zero}, path)
    refused(path, "SVD checkpoint", "models/checkpoints")
    save({"model.diffusion_model.input_blocks.0.0.bias": zero}, path)
    refused(path, "Stable Diffusion checkpoint")
    save({"lora_unet_x.lora_up.weight": zero}, path)
    refused(path, "LoRA")


def test_widths_that_do_not_fit(tmp_path: Path) -> None:
    extension = Extension.load(save(tensors(), tmp_path / "ext.safetensors"))
    extension.check_fits(WIDTHS, 6)
    with pytest.raises(ValueError, match="'ext.safetensors' does not fit.*16x8.*6.*2x320, 2x640, 6x1280.*1024"):
        extension.check_fits(FULL_WIDTHS, 1024)


def test_what_becomes_of_the_file_does_not_change_the_extension(tmp_path: Path) -> None:
    path = save(tensors(), tmp_path / "ext.safetensors")
    extension = Extension.load(path)
    before = {name: tensor.clone() for name, tensor in extension.tensors().items()}
    size = path.stat().st_size
    with path.open("r+b") as file:  # in place, as a copy over it does
        file.seek(size // 2)
        file.write(b"\x42" * (size // 2))
        file.truncate(size // 2)
    assert all(tensor.equal(before[name]) for name, tensor in extension.tensors().items())


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path, monkeypatch) -> None:
    path = save(tensors(), tmp_path / "ext.safetensors")
    real = torch.Tensor.clone

    def clone(tensor: torch.Tensor) -> torch.Tensor:
        path.touch()
        return real(tensor)

    monkeypatch.setattr(torch.Tensor, "clone", clone)
    refused(path, "changed while it was being read", "again")
