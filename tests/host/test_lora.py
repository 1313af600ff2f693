"""ExVideo's LoRAs for CogVideoX and Wan, and CogVideoX itself, compared with DiffSynth."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import comfy.model_base
import comfy.sample
import comfy.sd
import pytest
import torch
from comfy.model_patcher import ModelPatcher

import cogvideox
import reference
import wan
from exvideo_core.comfyui import cogvideox as host_cogvideox
from exvideo_core.comfyui.lora import apply_lora
from exvideo_core.files.safetensors_header import ModelFileError
from exvideo_core.method import lora
from exvideo_core.method.cogvideox import reference_rotary

needs_cogvideox = pytest.mark.skipif(
    not hasattr(comfy.model_base, "CogVideoX"), reason="this ComfyUI has no CogVideoX (0.33 has)"
)
#: Forms of the names: prefix, and whether PEFT's adapter name is there.
FORMS = ("{}.lora_{}.default.weight", "{}.lora_{}.weight", "pipe.dit.{}.lora_{}.default.weight",
         "diffusion_model.{}.lora_{}.weight")  # fmt: skip
#: DiffSynth's names of a CogDiT block's layers -> diffusers'.
DIFFUSERS = {"attn1.to_out": "attn1.to_out.0", "ff.0": "ff.net.0.proj", "ff.2": "ff.net.2"}


@pytest.fixture(scope="module")
def cog(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """CogVideoX in DiffSynth and, from diffusers' layout, in ComfyUI."""
    if not hasattr(comfy.model_base, "CogVideoX"):
        pytest.skip("this ComfyUI has no CogVideoX")
    theirs = cogvideox.reference_model()
    path = cogvideox.save(cogvideox.diffusers_tensors(theirs), tmp_path_factory.mktemp("cog") / "cog.safetensors")
    return SimpleNamespace(theirs=theirs, model=host_cogvideox.load_diffusers_transformer(path), path=path)


@pytest.fixture(scope="module")
def wan_models() -> SimpleNamespace:
    """Wan in DiffSynth and in ComfyUI."""
    theirs = wan.reference_model()
    model = comfy.sd.load_diffusion_model_state_dict(
        {name: value.clone() for name, value in theirs.state_dict().items()}
    )
    return SimpleNamespace(theirs=theirs, model=model)


@contextlib.contextmanager
def loaded(model: ModelPatcher) -> Iterator[torch.nn.Module]:
    """A patched model's `diffusion_model`."""
    model.patch_model(device_to=torch.device("cpu"))
    try:
        yield model.model.diffusion_model
    finally:
        model.unpatch_model(torch.device("cpu"))


def call_cog(transformer: torch.nn.Module, size: tuple[int, int, int] = (2, 20, 30)) -> torch.Tensor:
    """One call of DiffSynth's or ComfyUI's transformer."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(1, 16, *size, generator=generator)
    prompt = torch.randn(1, 7, cogvideox.TEXT, generator=generator)
    with torch.no_grad():
        return transformer(x, torch.tensor([500.0]), prompt)


def call_wan(transformer: torch.nn.Module, size: tuple[int, int, int] = (3, 16, 24)) -> torch.Tensor:
    """One call of DiffSynth's or ComfyUI's transformer."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(1, 16, *size, generator=generator)
    # ComfyUI pads prompts in its text encoder; here they have the full length.
    prompt = torch.randn(1, 512, wan.TEXT, generator=generator)
    with torch.no_grad():
        return transformer(x, torch.tensor([500.0]), prompt)


def distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Relative error."""
    return float((ours - theirs).norm() / theirs.norm())


def cog_lora(folder: Path, form: str = FORMS[0], modules: list[str] | None = None) -> tuple[lora.LoraFile, dict]:
    """A LoRA of CogVideoX, and its tensors under DiffSynth's names."""
    weights = cogvideox.reference_model().state_dict()
    tensors = cogvideox.lora_tensors(weights, modules or cogvideox.block_modules())
    renamed = {}
    for name, tensor in tensors.items():
        module, half = name.removesuffix(".default.weight").rsplit(".lora_", 1)
        renamed[form.format(module, half)] = tensor
    return lora.read(cogvideox.save(renamed, folder / "lora.safetensors")), tensors


@needs_cogvideox
@pytest.mark.parametrize("size", [(2, 60, 90), (2, 40, 64), (1, 90, 60)])
def test_one_call_of_cogvideox_is_the_references(cog, size: tuple[int, int, int]) -> None:
    theirs = call_cog(cog.theirs, size)
    with loaded(host_cogvideox.with_reference_positions(cog.model)) as transformer:
        assert distance(call_cog(transformer, size), theirs) <= 1e-5


@needs_cogvideox
def test_comfyui_still_needs_the_patch_of_positions(cog) -> None:
    """If this fails, ComfyUI has mended its positions: remove `with_reference_positions`."""
    theirs = call_cog(cog.theirs, (2, 60, 90))
    with loaded(cog.model) as transformer:
        assert distance(call_cog(transformer, (2, 60, 90)), theirs) > 1e-3


@needs_cogvideox
def test_positions_are_patched_only_where_they_differ(cog, monkeypatch) -> None:
    patched = host_cogvideox.with_reference_positions(cog.model)
    assert host_cogvideox._ROTARY in patched.object_patches and not cog.model.object_patches

    other = cog.model.clone()
    other.add_object_patch(host_cogvideox._ROTARY, len)
    assert host_cogvideox.with_reference_positions(other).object_patches[host_cogvideox._ROTARY] is len

    with loaded(patched):  # whose patch is on the shared module now
        assert host_cogvideox._ROTARY in host_cogvideox.with_reference_positions(cog.model).object_patches

    rotary = patched.object_patches[host_cogvideox._ROTARY]
    kind = type(cog.model.model.diffusion_model)
    monkeypatch.setattr(kind, "_get_rotary_emb", lambda self, h, w, t, device: rotary(h, w, t, device))
    assert not host_cogvideox.with_reference_positions(cog.model).object_patches


@needs_cogvideox
def test_positions_of_129_frames_are_0_to_32(cog) -> None:
    rotary = reference_rotary((30, 45), 64)
    cos, sin = rotary(2, 3, 33, torch.device("cpu"))
    time = torch.atan2(sin, cos).view(33, 2, 3, 64)[:, 0, 0, 0]
    expected = torch.arange(33.0)  # the first frequency is 1 per frame
    torch.testing.assert_close(time, torch.atan2(expected.sin(), expected.cos()), atol=1e-5, rtol=0)


@needs_cogvideox
@pytest.mark.parametrize("form", FORMS)
def test_every_target_of_a_cogvideox_lora_is_w_plus_b_a(cog, tmp_path: Path, form: str) -> None:
    file, tensors = cog_lora(tmp_path, form)
    assert file.family is lora.COGVIDEOX and file.blocks == cogvideox.LAYERS and file.ranks == [cogvideox.RANK]
    renamed = {"attn1.to_q": "q", "attn1.to_k": "k", "attn1.to_v": "v", "attn1.to_out": "attn_out", "ff.0": "ff_proj",
               "ff.2": "ff_out", "norm1.linear": "norm1.linear", "norm2.linear": "norm2.linear"}  # fmt: skip
    base = {name: value.clone() for name, value in cog.model.model.diffusion_model.state_dict().items()}
    with loaded(apply_lora(cog.model, file, 0.5)) as transformer:
        patched = transformer.state_dict()
        changed = {name for name in base if not patched[name].equal(base[name])}
        expected = set()
        for block in range(cogvideox.LAYERS):
            for theirs, ours in renamed.items():
                up, down = (tensors[f"blocks.{block}.{theirs}.lora_{half}.default.weight"] for half in "BA")
                name = f"blocks.{block}.{ours}.weight"
                assert distance(patched[name], base[name] + 0.5 * up @ down) <= 1e-6
                expected.add(name)
        assert changed == expected
    assert all(value.equal(base[name]) for name, value in cog.model.model.diffusion_model.state_dict().items())


@needs_cogvideox
@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_diffusers_names_are_the_same_lora(cog, tmp_path: Path, prefix: str) -> None:
    file, tensors = cog_lora(tmp_path)
    renamed = {}
    for name, tensor in tensors.items():
        module, half = name.removesuffix(".default.weight").rsplit(".lora_", 1)
        block, own = module.removeprefix("blocks.").split(".", 1)
        renamed[f"{prefix}transformer_blocks.{block}.{DIFFUSERS.get(own, own)}.lora_{half}.weight"] = tensor
    same = lora.read(cogvideox.save(renamed, tmp_path / "diffusers.safetensors"))
    with loaded(apply_lora(cog.model, file, 1.0)) as transformer:
        first = call_cog(transformer)
    with loaded(apply_lora(cog.model, same, 1.0)) as transformer:
        assert call_cog(transformer).equal(first)


@needs_cogvideox
def test_cogvideox_with_a_lora_is_the_references(cog, tmp_path: Path) -> None:
    outer = ["context_embedder", "time_embedder.timestep_embedder.0", "time_embedder.timestep_embedder.2",
             "norm_out.linear", "proj_out"]  # fmt: skip
    file, tensors = cog_lora(tmp_path, modules=cogvideox.block_modules() + outer)
    theirs = call_cog(cogvideox.with_lora(cogvideox.reference_model(), tensors))
    with loaded(apply_lora(cog.model, file, 1.0)) as transformer:
        ours = call_cog(transformer)
    assert distance(ours, theirs) <= 1e-5
    assert distance(call_cog(cog.theirs), theirs) > 0.1  # the LoRA changes something


@needs_cogvideox
def test_strength_0_of_a_cogvideox_lora_leaves_the_weights_alone(cog, tmp_path: Path) -> None:
    file, _ = cog_lora(tmp_path)
    with loaded(host_cogvideox.with_reference_positions(cog.model)) as transformer:
        plain = call_cog(transformer)
    patched = apply_lora(cog.model, file, 0.0)
    assert not patched.patches
    with loaded(patched) as transformer:
        assert call_cog(transformer).equal(plain)


@needs_cogvideox
def test_ten_steps_of_cogvideox_are_the_references(cog) -> None:
    """VOIDSampler on a "normal" schedule is DiffSynth's DDIM with guidance 7."""
    from comfy_extras.nodes_void import VOID_DDIM

    scheduler = reference.module("schedulers.ddim").EnhancedDDIMScheduler(
        rescale_zero_terminal_snr=True, prediction_type="v_prediction"
    )
    scheduler.set_timesteps(10)
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(1, 16, 2, 20, 30, generator=generator)
    prompts = torch.randn(2, 7, cogvideox.TEXT, generator=generator)
    theirs = noise.clone()
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            positive, negative = (cog.theirs(theirs, timestep[None], prompt[None]) for prompt in prompts)
            theirs = scheduler.step(negative + 7.0 * (positive - negative), timestep, theirs)

    model = host_cogvideox.with_reference_positions(cog.model)
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", 10)
    conditions = [[[prompt[None], {}]] for prompt in prompts]
    ours = comfy.sample.sample_custom(
        model, noise, 7.0, VOID_DDIM(), sigmas, *conditions, torch.zeros_like(noise), disable_pbar=True, seed=0
    )
    assert distance(model.model.process_latent_in(ours), theirs) <= 1e-3


@needs_cogvideox
def test_a_model_in_two_files_is_the_model_in_one(cog, tmp_path: Path) -> None:
    tensors = cogvideox.diffusers_tensors(cog.theirs)
    names = sorted(tensors)
    files = [tmp_path / f"diffusion_pytorch_model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for file, part in zip(files, (names[::2], names[1::2]), strict=True):
        cogvideox.save({name: tensors[name] for name in part}, file)
    for file in files:
        model = host_cogvideox.load_diffusers_transformer(file)
        state = model.model.diffusion_model.state_dict()
        assert all(value.equal(state[name]) for name, value in cog.model.model.diffusion_model.state_dict().items())
    files[0].unlink()
    with pytest.raises(ModelFileError, match=r"one of 2 files, but .*-00001-of-00002.safetensors is missing"):
        host_cogvideox.load_diffusers_transformer(files[1])
    with pytest.raises(ModelFileError, match="is not a CogVideoX transformer in diffusers' layout"):
        host_cogvideox.load_diffusers_transformer(
            cogvideox.save({"a.weight": torch.ones(1)}, tmp_path / "a.safetensors")
        )


def wan_lora(folder: Path, form: str = FORMS[0]) -> tuple[lora.LoraFile, dict]:
    """A LoRA of Wan, and its tensors under DiffSynth's names."""
    weights = wan.reference_model().state_dict()
    tensors = cogvideox.lora_tensors(weights, wan.block_modules())
    renamed = cogvideox.lora_tensors(weights, wan.block_modules(), form)
    return lora.read(cogvideox.save(renamed, folder / "lora.safetensors")), tensors


@pytest.mark.parametrize("form", FORMS)
def test_wan_with_a_lora_is_the_references(wan_models, tmp_path: Path, form: str) -> None:
    file, tensors = wan_lora(tmp_path, form)
    assert file.family is lora.WAN
    theirs_changed = cogvideox.with_lora(wan.reference_model(), tensors)
    theirs = call_wan(theirs_changed)
    with loaded(apply_lora(wan_models.model, file, 1.0)) as transformer:
        patched = transformer.state_dict()
        assert all(distance(patched[name], value) <= 1e-6 for name, value in theirs_changed.state_dict().items())
        assert distance(call_wan(transformer), theirs) <= 1e-5
    assert distance(call_wan(wan_models.theirs), theirs) > 0.1


def test_strength_0_of_a_wan_lora_is_the_plain_model(wan_models, tmp_path: Path) -> None:
    file, _ = wan_lora(tmp_path)
    with loaded(wan_models.model) as transformer:
        plain = call_wan(transformer)
    with loaded(apply_lora(wan_models.model, file, 0.0)) as transformer:
        assert call_wan(transformer).equal(plain)


def test_a_lora_of_the_other_model_is_refused(wan_models, tmp_path: Path, request) -> None:
    file, _ = cog_lora(tmp_path)
    if hasattr(comfy.model_base, "CogVideoX"):
        with pytest.raises(ValueError, match=r"is for CogVideoX-5B, but the model is a WAN21\. Load CogVideoX-5B"):
            apply_lora(wan_models.model, file, 1.0)
        with pytest.raises(
            ValueError, match=r"is for Wan 2\.1, but the model is a CogVideoX\. Load Wan 2\.1 T2V 1\.3B"
        ):
            apply_lora(request.getfixturevalue("cog").model, wan_lora(tmp_path)[0], 1.0)
    else:
        with pytest.raises(ValueError, match=r"is for CogVideoX, which this version .* Update ComfyUI to 0\.33"):
            apply_lora(wan_models.model, file, 1.0)


@needs_cogvideox
def test_a_later_cogvideox_is_refused(cog, tmp_path: Path) -> None:
    model = cog.model.clone()
    later = SimpleNamespace(patch_size_t=2, use_rotary_positional_embeddings=True)
    model.add_object_patch("diffusion_model", later)
    with pytest.raises(ValueError, match=r"is for CogVideoX-5B, but the model is a CogVideoX 1\.5"):
        apply_lora(model, cog_lora(tmp_path)[0], 1.0)


def test_a_lora_of_other_sizes_is_refused(wan_models, tmp_path: Path) -> None:
    weights = {name: torch.zeros(384, 384) for name in ("blocks.0.self_attn.q.weight", "blocks.7.self_attn.q.weight")}
    for module, message in (
        ("blocks.0.self_attn.q", r"changes a weight of \(384, 384\), the model has \(256, 256\)"),
        ("blocks.7.self_attn.q", r"does not fit this model, which has no blocks\.7\.self_attn\.q\."),
    ):
        path = cogvideox.save(cogvideox.lora_tensors(weights, [module]), tmp_path / "wide.safetensors")
        with pytest.raises(ValueError, match=message):
            apply_lora(wan_models.model, lora.read(path), 1.0)


@pytest.mark.parametrize("node", ["ExVideoWindows", "ExVideoTiles", "ExVideoMemory", "ExVideoInit"])
def test_nodes_for_svd_say_so(wan_models, node: str) -> None:
    from exvideo_core.comfyui.apply.create import untrained_extension
    from exvideo_core.comfyui.low_memory.chunked_unet import with_memory_settings
    from exvideo_core.comfyui.low_memory.estimate import MemorySettings
    from exvideo_core.comfyui.sampling.tiles import TileSettings, with_tiles
    from exvideo_core.comfyui.sampling.windows import WindowSettings, with_windows

    calls = {
        "ExVideoWindows": lambda model: with_windows(model, WindowSettings(16, 4)),
        "ExVideoTiles": lambda model: with_tiles(model, TileSettings(512, 512, 64)),
        "ExVideoMemory": lambda model: with_memory_settings(model, MemorySettings(0, True)),
        "ExVideoInit": lambda model: untrained_extension(model, 128),
    }
    with pytest.raises(ValueError, match=r"is a WAN21, but this node is for Stable Video Diffusion \(SVD\)"):
        calls[node](wan_models.model)
