"""Which LoRA files are accepted, and what the others are told."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from exvideo_core.files.safetensors_header import ModelFileError
from exvideo_core.method import lora

COG = ("blocks.{}.attn1.to_q", "blocks.{}.attn1.to_out", "blocks.{}.ff.0")
WAN = ("blocks.{}.self_attn.q", "blocks.{}.cross_attn.o", "blocks.{}.ffn.2")


def tensors(modules: tuple[str, ...] = COG, rank: int = 2, blocks: int = 2) -> dict[str, torch.Tensor]:
    found = {}
    for block in range(blocks):
        for module in modules:
            found[f"{module.format(block)}.lora_A.default.weight"] = torch.ones(rank, 6)
            found[f"{module.format(block)}.lora_B.default.weight"] = torch.ones(8, rank)
    return found


def write(found: dict[str, torch.Tensor], folder: Path, name: str = "lora.safetensors") -> Path:
    save_file(found, folder / name)
    return folder / name


@pytest.mark.parametrize(("modules", "family"), [(COG, lora.COGVIDEOX), (WAN, lora.WAN)])
def test_a_lora_says_what_it_is_for(modules, family, tmp_path: Path) -> None:
    file = lora.read(write(tensors(modules), tmp_path))
    assert file.family is family and file.blocks == 2 and file.ranks == [2] and len(file.pairs) == 6
    assert {pair.shape for pair in file.pairs.values()} == {(8, 6)}
    host = file.tensors()
    assert host["diffusion_model." + next(iter(file.pairs)) + ".lora_A.weight"].shape == (2, 6)
    assert len(host) == 12


def without(name: str) -> dict[str, torch.Tensor]:
    return {other: value for other, value in tensors().items() if other != name}


CASES = {
    "one key too few": (
        without("blocks.1.ff.0.lora_B.default.weight"),
        r"is incomplete: it contains blocks\.1\.ff\.0\.lora_A\.default\.weight, but not blocks\.1\.ff\.0\.lora_B\.",
    ),
    "one key too many": (
        tensors() | {"blocks.0.attn1.norm_q.weight": torch.ones(3)},
        r"is a LoRA of CogVideoX-5B, but also contains blocks\.0\.attn1\.norm_q\.weight\.",
    ),
    "an unknown layer": (
        tensors() | tensors(("blocks.{}.attn3.to_q",)),
        r"is a LoRA of CogVideoX-5B, but also contains blocks\.0\.attn3\.to_q\.lora_A\.default\..* and 1 more\.",
    ),
    "twice": (
        tensors() | {"blocks.0.q.lora_A.weight": torch.ones(2, 6)},
        r"contains the same weights twice, as blocks\.0\.",
    ),
    "ranks": (
        tensors() | {"blocks.0.ff.0.lora_A.default.weight": torch.ones(3, 6)},
        r"contains shapes that do not match: blocks\.0\.ff\.0\.lora_A\.default\.weight \(3, 6\)",
    ),
    "another model": (
        tensors(("double_blocks.{}.img_attn.qkv",)),
        r"is a LoRA of another model than CogVideoX-5B or Wan 2\.1: double_blocks\.0\.",
    ),
    "another format": (
        {"lora_unet_down_blocks_0.lora_up.weight": torch.ones(2, 2)},
        r"is not a LoRA that this node knows: it contains lora_unet_down_blocks_0\.lora_up\.weight\.",
    ),
    "an extension": (
        {"blocks.7.positional_embedding.embeddings": torch.ones(128, 4)},
        r"is an ExVideo extension for SVD, not a LoRA\. Put it into models/exvideo",
    ),
    "empty": ({}, r"is not a LoRA that this node knows: it contains nothing\."),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_no_such_lora_is_told_apart(case: str, tmp_path: Path) -> None:
    found, message = CASES[case]
    with pytest.raises(ModelFileError, match=r"'lora\.safetensors' " + message):
        lora.read(write(found, tmp_path))


def test_a_pickle_is_refused(tmp_path: Path) -> None:
    torch.save(tensors(), tmp_path / "lora.safetensors")
    with pytest.raises(ModelFileError, match="is a PyTorch pickle"):
        lora.read(tmp_path / "lora.safetensors")


def test_an_error_passes_from_one_process_to_another(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError) as caught:
        lora.read(write({}, tmp_path))
    passed = pickle.loads(pickle.dumps(caught.value))  # noqa: S301 - our own
    assert str(passed) == str(caught.value) and type(passed) is ModelFileError


def test_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    found = tensors()
    found["blocks.1.attn1.to_q.lora_B.default.weight"][0, 0] = float("nan")
    file = lora.read(write(found, tmp_path))
    with pytest.raises(ModelFileError, match=r"NaN or infinite values in blocks\.1\.attn1\.to_q\.lora_B"):
        file.tensors()


def described(path: Path, capsys, monkeypatch) -> tuple[int, str]:
    from runner import check_file

    monkeypatch.setattr("sys.argv", ["check", str(path)])
    code = check_file.main()
    out, err = capsys.readouterr()
    return code, out + err


def test_check_tells_what_a_lora_is(tmp_path: Path, capsys, monkeypatch) -> None:
    code, text = described(write(tensors(), tmp_path), capsys, monkeypatch)
    assert code == 0
    assert text.startswith("lora.safetensors (0.0 MB)\n  LoRA for CogVideoX-5B, rank 2, F32\n  6 weights in 2 blocks, ")
    assert "blocks.0.attn1.to_q.lora_B.default.weight (8, 2) -> blocks.0.q (8, 6)" in text
    assert "does not fit the published model (42 blocks of 3072)" in text


def test_check_tells_what_an_extension_is(tmp_path: Path, capsys, monkeypatch) -> None:
    from small_model import recipe

    code, text = described(recipe.EXTENSION, capsys, monkeypatch)
    assert code == 0 and "ExVideo extension for SVD, 128 frames" in text


def test_check_tells_what_a_transformer_is(tmp_path: Path, capsys, monkeypatch) -> None:
    names = ("transformer_blocks.0.attn1.to_q.weight", "patch_embed.proj.bias", "time_embedding.linear_1.weight")
    path = write({name: torch.ones(2) for name in names}, tmp_path, "part-00001-of-00001.safetensors")
    code, text = described(path, capsys, monkeypatch)
    assert code == 0 and "CogVideoX transformer in diffusers' layout, 3 tensors, F32" in text
    assert "transformer_blocks.0.attn1.to_q.weight (2,) -> blocks.0.q.weight" in text
    assert "time_embedding.linear_1.weight (2,) -> time_embedding_linear_1.weight" in text and "(1 file)" in text


def test_check_tells_what_a_checkpoint_is(capsys, monkeypatch) -> None:
    from small_model import recipe

    code, text = described(recipe.CHECKPOINT, capsys, monkeypatch)
    assert code == 0 and "an SVD checkpoint (it belongs in models/checkpoints), 1726 tensors, F16" in text


def test_check_tells_what_is_wrong(tmp_path: Path, capsys, monkeypatch) -> None:
    path = write({"a": torch.ones(1)}, tmp_path, "a.safetensors")
    code, text = described(path, capsys, monkeypatch)
    assert code == 1 and text.startswith("'a.safetensors' is not a LoRA that this node knows: it contains a.")
