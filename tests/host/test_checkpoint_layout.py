"""What a checkpoint has to hold: the published file's names or the host's own, and nothing less."""

from __future__ import annotations

import ast
import copy
import importlib.util
import json
import struct
from pathlib import Path

import comfy.sd
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import random_model
from exvideo_core.comfyui.checkpoint.load import load_checkpoint
from exvideo_core.comfyui.checkpoint.validate import CLIP, UNET, VAE, _Multiple, clip_vision_weights, read_sizes
from exvideo_core.files.safetensors_header import ModelFileError, read_header


def reference_names(module: str, prefix: str) -> set[str]:
    """Names of the published checkpoint that the reference's converter knows, from its source."""
    (package,) = importlib.util.find_spec("diffsynth").submodule_search_locations
    tree = ast.parse((Path(package) / "models" / f"{module}.py").read_text(encoding="utf-8"))
    texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    return {text for text in texts if text.startswith(prefix)}


def svd_sized(folder: Path, saved_by_host: bool = False) -> Path:
    """A file of SVD's own sizes, in either layout, whose data are a hole."""
    header, size = random_model.svd_header()
    if saved_by_host:
        shapes = {name: torch.empty(shape, device="meta") for name, shape in random_model.svd_shapes().items()}
        encoder = clip_vision_weights({name: shapes.pop(name) for name in list(shapes) if name.startswith(CLIP)})
        header, size = {}, 0
        for name, tensor in (shapes | {CLIP + name: tensor for name, tensor in encoder.items()}).items():
            offsets = [size, size + 2 * tensor.numel()]
            header[name] = {"dtype": "F16", "shape": list(tensor.shape), "data_offsets": offsets}
            size = offsets[1]
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
    assert sizes.is_published
    names = set(header.shapes)
    assert {name for name in names if name.startswith(UNET)} == reference_names("svd_unet", UNET)
    decoder = f"{VAE}decoder."
    found = reference_names("svd_vae_decoder", decoder)
    assert {name for name in names if name.startswith(decoder)} == found and len(found) > 200
    assert sizes.clip_vision["num_hidden_layers"] == 32 and sizes.clip_vision["image_size"] == 224


def test_svds_own_sizes_go_to_the_hosts_loader_in_either_layout(tmp_path) -> None:
    path = svd_sized(tmp_path, saved_by_host=True)
    assert read_sizes(str(path), read_header(path)).is_published


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
    with pytest.raises(ModelFileError, match=f"'spoiled.safetensors' is missing .* of the {part}"):
        load_checkpoint(str(path))
    save_file({**tensors, name: tensors[name].flatten()[:-1].clone()}, path, metadata)
    with pytest.raises(
        ModelFileError, match="spoiled.safetensors' has .*shape|spoiled.safetensors' does not have the sizes of"
    ):
        load_checkpoint(str(path))


@pytest.mark.parametrize("heads", ["0", "-8", "7", "many", "3.5"])
@pytest.mark.parametrize("key", ["exvideo.num_head_channels", "exvideo.clip_num_attention_heads"])
def test_head_sizes_that_do_not_fit_are_refused(tmp_path, content, key: str, heads: str) -> None:
    tensors, metadata = content
    path = tmp_path / "heads.safetensors"
    save_file(tensors, path, {**metadata, key: heads})
    with pytest.raises(ModelFileError, match="does not have the sizes of a Stable Video Diffusion model"):
        load_checkpoint(str(path))


def test_further_tensors_do_no_harm(tmp_path, content) -> None:
    tensors, metadata = content
    path = tmp_path / "more.safetensors"
    save_file({**tensors, "model_ema.decay": torch.zeros(1), f"{VAE}quant_conv.bias": torch.zeros(8)}, path, metadata)
    model, _, _ = load_checkpoint(str(path))
    assert model.model.diffusion_model.state_dict()["out.2.bias"].equal(tensors[f"{UNET}out.2.bias"])


def test_levels_may_be_narrower_than_the_first(tmp_path, monkeypatch) -> None:
    halves = [1, 1, _Multiple(0.5), _Multiple(0.5)]
    monkeypatch.setitem(random_model.UNET, "model_channels", 64)
    monkeypatch.setitem(random_model.UNET, "channel_mult", halves)
    path, _ = random_model.make(tmp_path)
    model, _, _ = loaded = load_checkpoint(str(path))
    unet = model.model.diffusion_model
    assert [unet.input_blocks[block][0].out_channels for block in (1, 4, 7, 10)] == [64, 64, 32, 32]
    with safe_open(path, framework="pt") as file:
        for name, value in unet.state_dict().items():
            assert value.equal(file.get_tensor(UNET + name).to(value)), name
    assert all(torch.isfinite(result).all() for result in results(loaded))
    config = model.model.model_config.unet_config
    assert copy.deepcopy(config)["channel_mult"] == halves


def weights(loaded) -> dict[str, torch.Tensor]:
    """The weights of a loaded checkpoint's three parts."""
    model, clip_vision, vae = loaded
    modules = {"unet": model.model.diffusion_model, "clip": clip_vision.model, "vae": vae.first_stage_model}
    return {f"{part}.{name}": value for part, module in modules.items() for name, value in module.state_dict().items()}


@torch.no_grad()
def results(loaded) -> list[torch.Tensor]:
    """What the three parts make of the same input."""
    model, clip_vision, vae = loaded
    generator = torch.Generator().manual_seed(3)
    picture = torch.rand(1, 64, 64, 3, generator=generator)
    embedding = clip_vision.encode_image(picture).image_embeds
    latent = vae.encode(picture)
    noise = torch.randn(2, 8, 8, 8, generator=generator)
    unet = model.model.diffusion_model
    # The numbers of heads are in no weight: only what is computed tells of them.
    out = unet(
        noise.to(unet.dtype),
        torch.ones(2),
        context=embedding.unsqueeze(0).repeat(2, 1, 1).to(unet.dtype),
        y=torch.randn(2, 768, generator=generator).to(unet.dtype),
        num_video_frames=2,
        image_only_indicator=torch.zeros(1, 2),
    )
    return [embedding, latent, vae.decode(latent), out]


@pytest.fixture
def saved(tmp_path, small_models) -> tuple[tuple, Path]:
    """A checkpoint as loaded, and the file that the host's Save Checkpoint makes of it."""
    loaded = load_checkpoint(str(small_models[0]))
    path = tmp_path / "saved.safetensors"
    model, clip_vision, vae = loaded
    comfy.sd.save_checkpoint(str(path), model, vae=vae, clip_vision=clip_vision, metadata={"prompt": ""})
    return loaded, path


def test_what_the_host_has_saved_loads_as_it_was(saved) -> None:
    loaded, path = saved
    names = set(read_header(path).shapes)
    assert f"{CLIP}conv1.weight" not in names and f"{CLIP}visual_projection.weight" in names
    again = load_checkpoint(str(path))
    expected, found = weights(loaded), weights(again)
    assert found.keys() == expected.keys()
    assert all(found[name].equal(value) for name, value in expected.items())
    for ours, theirs in zip(results(again), results(loaded), strict=True):
        assert ours.equal(theirs)
    again_path = path.with_name("again.safetensors")
    comfy.sd.save_checkpoint(str(again_path), again[0], vae=again[2], clip_vision=again[1], metadata={})
    assert read_header(again_path).shapes == read_header(path).shapes


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        (f"{UNET}exvideo.num_head_channels", "does not give the number of channels per attention head of the UNet"),
        (
            f"{CLIP}exvideo.clip_num_attention_heads",
            "does not give the number of attention heads of the CLIP vision model",
        ),
    ],
)
def test_a_saved_file_that_has_lost_its_heads_is_refused(saved, name: str, problem: str) -> None:
    _, path = saved
    with safe_open(path, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping
    spoiled = path.with_name("spoiled.safetensors")
    save_file({key: value for key, value in tensors.items() if key != name}, spoiled)
    with pytest.raises(ModelFileError, match=f"'spoiled.safetensors' {problem}"):
        load_checkpoint(str(spoiled))
    save_file({**tensors, name: torch.tensor(float("nan"))}, spoiled)
    with pytest.raises(ModelFileError, match="does not have the sizes of a Stable Video Diffusion model"):
        load_checkpoint(str(spoiled))


def test_a_file_with_an_image_decoder_names_the_node_that_loads_it(tmp_path, content) -> None:
    from comfy_extras import nodes_video_model

    tensors, metadata = content
    path = tmp_path / "svd_xt_image_decoder.safetensors"
    spatial = {key: value for key, value in tensors.items() if "time_stack" not in key or not key.startswith(VAE)}
    save_file({key: value for key, value in spatial.items() if "mix_factor" not in key or UNET in key}, path, metadata)
    with pytest.raises(ModelFileError, match="single images, without SVD's temporal layers") as error:
        load_checkpoint(str(path))
    assert nodes_video_model.NODE_DISPLAY_NAME_MAPPINGS["ImageOnlyCheckpointLoader"] in str(error.value)
