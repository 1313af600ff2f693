"""What a checkpoint has to hold: the published file's names, and nothing less."""

from __future__ import annotations

import ast
import importlib.util
import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import random_model
from exvideo_core.hosts.comfyui.checkpoint import load_checkpoint
from exvideo_core.hosts.comfyui.checkpoint_layout import CLIP, UNET, VAE, read_sizes
from exvideo_core.safetensors_header import ModelFileError, read_header


def reference_names(module: str, prefix: str) -> set[str]:
    """Names of the published checkpoint that the reference's converter knows, from its source."""
    (package,) = importlib.util.find_spec("diffsynth").submodule_search_locations
    tree = ast.parse((Path(package) / "models" / f"{module}.py").read_text(encoding="utf-8"))
    texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    return {text for text in texts if text.startswith(prefix)}


def svd_sized(folder: Path) -> Path:
    """A file of SVD's own sizes, whose data are a hole."""
    header, size = random_model.svd_header()
    raw = json.dumps(header).encode()
    path = folder / "svd.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.truncate(8 + len(raw) + size)
    return path


def test_svds_own_file_is_asked_for_what_the_reference_reads_of_it(tmp_path) -> None:
    path = svd_sized(tmp_path)
    header = read_header(path)
    sizes = read_sizes(str(path), header)
    assert sizes.is_svd
    names = set(header.shapes)
    assert {name for name in names if name.startswith(UNET)} == reference_names("svd_unet", UNET)
    decoder = f"{VAE}decoder."
    found = reference_names("svd_vae_decoder", decoder)
    assert {name for name in names if name.startswith(decoder)} == found and len(found) > 200
    assert sizes.clip["num_hidden_layers"] == 32 and sizes.clip["image_size"] == 224


@pytest.fixture(scope="module")
def content(small_models) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    with safe_open(small_models[0], framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118 - no mapping


@pytest.mark.parametrize(
    ("name", "part"),
    [
        (f"{UNET}output_blocks.11.1.time_stack.0.ff.net.2.bias", "UNet"),
        (f"{UNET}out.2.weight", "UNet"),
        (f"{VAE}decoder.up.0.block.0.time_stack.out_layers.3.bias", "VAE"),
        (f"{VAE}encoder.mid.attn_1.q.weight", "VAE"),
        (f"{CLIP}transformer.resblocks.1.ln_2.bias", "CLIP vision model"),
    ],
)
def test_a_tensor_that_is_lost_or_misshapen_is_named(tmp_path, content, name: str, part: str) -> None:
    tensors, metadata = content
    path = tmp_path / "spoiled.safetensors"
    save_file({key: value for key, value in tensors.items() if key != name}, path, metadata)
    with pytest.raises(ModelFileError, match=f"'spoiled.safetensors' lacks .* of the {part}"):
        load_checkpoint(str(path))
    save_file({**tensors, name: tensors[name].flatten()[:-1].clone()}, path, metadata)
    with pytest.raises(
        ModelFileError, match="spoiled.safetensors' has .*shape|spoiled.safetensors' has the sizes of no"
    ):
        load_checkpoint(str(path))


@pytest.mark.parametrize("heads", ["0", "-8", "7", "many", "3.5"])
@pytest.mark.parametrize("key", ["exvideo.num_head_channels", "exvideo.clip_num_attention_heads"])
def test_head_sizes_that_do_not_fit_are_refused(tmp_path, content, key: str, heads: str) -> None:
    tensors, metadata = content
    path = tmp_path / "heads.safetensors"
    save_file(tensors, path, {**metadata, key: heads})
    with pytest.raises(ModelFileError, match="has the sizes of no Stable Video Diffusion model"):
        load_checkpoint(str(path))


def test_further_tensors_do_no_harm(tmp_path, content) -> None:
    tensors, metadata = content
    path = tmp_path / "more.safetensors"
    save_file({**tensors, "model_ema.decay": torch.zeros(1), f"{VAE}quant_conv.bias": torch.zeros(8)}, path, metadata)
    model, _, _ = load_checkpoint(str(path))
    assert model.model.diffusion_model.state_dict()["out.2.bias"].equal(tensors[f"{UNET}out.2.bias"])
