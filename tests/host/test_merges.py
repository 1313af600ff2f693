"""Merging and saving: merges make the base, whenever they are made; LoRAs add to the extension; the rest is refused."""

from __future__ import annotations

import comfy.sd
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import random_model
import svd
from composition import lora, node
from exvideo_core.comfyui.apply.patch import apply_extension
from exvideo_core.comfyui.checkpoint.load import load_checkpoint
from exvideo_core.method.extension import Extension
from exvideo_core.method.tensor_names import SHARED_TENSORS, SVD_TRANSFORMERS

ROUNDING = 1e-4


@pytest.fixture(scope="module")
def files(small_models, tmp_path_factory):
    """Two checkpoints."""
    return small_models[0], random_model.make(tmp_path_factory.mktemp("other"), seed=5)[0]


@pytest.fixture(scope="module")
def bases(files):
    return [load_checkpoint(str(path))[0] for path in files]


@pytest.fixture(scope="module")
def extension(small_models):
    return Extension.load(small_models[1])


def call(model) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    sample = torch.randn(1, 4, 8, 8, 8, generator=generator)
    context = torch.randn(1, 1, 64, generator=generator)
    return svd.call_host(model, sample, 0.5, context, torch.tensor([[29.0, 127.0, 0.02]]))


#: Name -> the host's node, its inputs, and the share of each model where the whole UNet has the same.
MERGES = {
    "half": ("ModelMergeSimple", {"ratio": 0.5}, (0.5, 0.5)),
    "all of the second": ("ModelMergeSimple", {"ratio": 0.0}, (0.0, 1.0)),
    "sum": ("ModelAdd", {}, (1.0, 1.0)),
    "difference": ("ModelSubtract", {"multiplier": 0.3}, None),
    "by blocks": ("ModelMergeBlocks", {"input": 0.8, "middle": 0.4, "out": 0.1}, None),
}


def merge(kind: str, first, second):
    name, inputs, _ = MERGES[kind]
    found = node("nodes_model_merging", name)
    return getattr(found(), found.FUNCTION)(first, second, **inputs)[0]


def merged_in_a_file(kind: str, files, folder):
    shares, (first, second) = MERGES[kind][2], (load_file(path) for path in files)
    merged = {}
    for name, tensor in first.items():
        a, b = shares if name.startswith("model.diffusion_model.") else (1.0, 0.0)
        merged[name] = a * tensor.float() + b * second[name].float()
    path = folder / "merged.safetensors"
    with safe_open(files[0], "pt") as file:
        save_file(merged, path, metadata=file.metadata())
    return load_checkpoint(str(path))[0]


#: Each of these writes and loads a checkpoint and patches every weight of two models.
_NIGHTLY = [("half", 1.0), ("all of the second", 1.0), ("all of the second", 0.5), ("sum", 1.0), ("sum", 0.5)]


@pytest.mark.parametrize(
    ("kind", "strength"),
    [("half", 0.5), *(pytest.param(*case, marks=pytest.mark.nightly) for case in _NIGHTLY)],
)
def test_a_merge_before_or_after_is_the_base_as_from_a_file(bases, files, extension, tmp_path, kind, strength) -> None:
    expected = call(apply_extension(merged_in_a_file(kind, files, tmp_path), extension, strength))
    unmerged = call(apply_extension(bases[0], extension, strength))
    before = call(apply_extension(merge(kind, *bases), extension, strength))
    after = call(merge(kind, apply_extension(bases[0], extension, strength), bases[1]))
    assert svd.relative_error(before, expected) < ROUNDING
    assert after.equal(before)
    assert svd.relative_error(unmerged, expected) > 0.05


@pytest.mark.nightly
@pytest.mark.parametrize("kind", ["by blocks", "difference"])
def test_other_merges_before_or_after_are_the_same(bases, extension, kind) -> None:
    before = call(apply_extension(merge(kind, *bases), extension))
    assert call(merge(kind, apply_extension(bases[0], extension), bases[1])).equal(before)
    assert svd.relative_error(before, call(apply_extension(bases[0], extension))) > 1e-2


def test_loras_add_to_the_extension_around_merges(bases, extension) -> None:
    shared = [f"{name}.{ours}" for name in SVD_TRANSFORMERS for ours in SHARED_TENSORS.values()]

    def with_lora(model, strength=1.0, of_extension=None):
        own, others = {}, {}
        for name, tensor in lora(model).items():
            layer = name.removeprefix("diffusion_model.").partition(".lora_")[0]
            (own if f"{layer}.weight" in shared else others)[name] = tensor
        assert own and others
        model = comfy.sd.load_lora_for_models(model, None, own, of_extension or strength, 0.0)[0]
        return comfy.sd.load_lora_for_models(model, None, others, strength, 0.0)[0]

    merged = merge("half", *bases)
    expected = call(with_lora(apply_extension(merged, extension)))
    assert call(apply_extension(with_lora(merged), extension)).equal(expected)
    # A merge after a LoRA halves it, as ComfyUI does, except on the extension's own weights.
    halved = with_lora(apply_extension(merged, extension), 0.5, of_extension=1.0)
    late = merge("half", with_lora(apply_extension(bases[0], extension)), bases[1])
    assert svd.relative_error(call(late.clone()), call(halved)) < ROUNDING
    assert svd.relative_error(call(late), expected) > 10 * ROUNDING
    assert svd.relative_error(expected, call(apply_extension(merged, extension))) > 0.05


@pytest.mark.parametrize("cloned", [False, True])
def test_an_extended_model_is_not_merged_into_another(bases, extension, cloned) -> None:
    extended = apply_extension(bases[0], extension)
    extended = extended.clone() if cloned else extended
    before = call(extended)
    with pytest.raises(ValueError, match="Merge the models before ExVideo Apply"):
        merge("half", bases[1], extended)
    assert call(extended).equal(before)


@pytest.mark.parametrize("loaded", [False, True])
def test_an_extended_model_is_not_saved_as_a_checkpoint(bases, extension, tmp_path, loaded) -> None:
    plain, path = call(bases[0]), tmp_path / "saved.safetensors"
    extended = apply_extension(bases[0], extension)
    if loaded:
        call(extended)
    with pytest.raises(ValueError, match="Save the model that goes into ExVideo Apply.*Save ExVideo Extension"):
        comfy.sd.save_checkpoint(str(path), extended)
    assert not path.exists()
    assert call(bases[0]).equal(plain)
    comfy.sd.save_checkpoint(str(path), bases[0])
    assert not [name for name in load_file(path) if "positional_conv" in name]
