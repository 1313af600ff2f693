"""ExVideo's LoRAs: which model a file is for, and what its targets are called in ComfyUI's model.

The authors publish ExVideo for CogVideoX-5B (129 frames) and Wan 2.1 T2V 1.3B as LoRAs with the module names of
DiffSynth's `CogDiT` and `WanModel`, without alpha. ComfyUI ignores names that it does not know.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..files.safetensors_header import Header, ModelFileError, read_header
from . import tensor_names
from .cogvideox import BLOCK_MODULES

if TYPE_CHECKING:
    import torch

_PREFIXES = ("pipe.dit.", "diffusion_model.", "transformer.")
_HALF = re.compile(r"(?P<module>.+)\.lora_(?P<half>[AB])(\.default)?\.weight")
_BLOCK = re.compile(r"(?:transformer_)?blocks\.(?P<block>\d+)\.(?P<module>.+)")
_SOURCE = (
    "Use a LoRA of ExVideo: ExVideo-CogVideoX-LoRA-129f-v1 for CogVideoX-5B, Wan2.1-1.3b-lora-exvideo-v1 for Wan 2.1 "
    "T2V 1.3B."
)
_SHOWN = 3  # keys in a message


@dataclass(frozen=True)
class Family:
    """A model that ExVideo has a LoRA for.

    Attributes:
        name: of the model, for messages.
        published: the published model, for messages.
        blocks: number of transformer blocks of the published model.
        width: of its blocks.
        block_modules: linear layers of a transformer block -> their names in ComfyUI.
        other_modules: linear layers outside of the blocks -> their names in ComfyUI.
    """

    name: str
    published: str
    blocks: int
    width: int
    block_modules: Mapping[str, str]
    other_modules: Mapping[str, str]

    def host_module(self, module: str) -> str | None:
        """ComfyUI's name of a linear layer, or None if this model has no such layer."""
        match = _BLOCK.fullmatch(module)
        if match is None:
            return self.other_modules.get(module)
        found = self.block_modules.get(match["module"])
        return None if found is None else f"blocks.{match['block']}.{found}"


def _cogvideox() -> Family:
    """Names of DiffSynth's `CogDiT`, of diffusers' `CogVideoXTransformer3DModel`, and ComfyUI's own."""
    norms = ("norm_q", "norm_k", ".norm")
    block = {theirs: ours for theirs, ours in BLOCK_MODULES.items() if not theirs.endswith(norms)}
    block |= {"attn1.to_out": "attn_out", "ff.0": "ff_proj", "ff.2": "ff_out"}
    other = {"context_embedder": "patch_embed.text_proj", "norm_out.linear": "norm_out.linear", "proj_out": "proj_out"}
    for number, place in ((1, 0), (2, 2)):
        other[f"time_embedder.timestep_embedder.{place}"] = f"time_embedding_linear_{number}"
        other[f"time_embedding.linear_{number}"] = f"time_embedding_linear_{number}"
    source = "CogVideoX-5B (zai-org/CogVideoX-5b)"
    return Family("CogVideoX-5B", source, 42, 3072, {**block, **_same(block)}, {**other, **_same(other)})


def _wan() -> Family:
    """Names of DiffSynth's `WanModel`, which are also ComfyUI's."""
    block = [f"{attention}.{name}" for attention in ("self_attn", "cross_attn") for name in "qkvo"]
    other = [f"{embedding}_embedding.{place}" for embedding in ("text", "time") for place in (0, 2)]
    return Family(
        "Wan 2.1", "Wan 2.1 T2V 1.3B", 30, 1536, {name: name for name in (*block, "ffn.0", "ffn.2")},
        {name: name for name in (*other, "time_projection.1", "head.head")},
    )  # fmt: skip


def _same(names: Mapping[str, str]) -> dict[str, str]:
    return {name: name for name in names.values()}


COGVIDEOX, WAN = _cogvideox(), _wan()
FAMILIES = (COGVIDEOX, WAN)


@dataclass(frozen=True)
class Pair:
    """The two factors of a change B A of a weight.

    Attributes:
        down: name of A [rank, in] in the file.
        up: name of B [out, rank] in the file.
        shape: of the weight (out, in).
        rank: of the change.
    """

    down: str
    up: str
    shape: tuple[int, int]
    rank: int


@dataclass(frozen=True)
class LoraFile:
    """A checked LoRA, without its tensors.

    Attributes:
        path: of the file.
        family: the model that it is for.
        pairs: by ComfyUI's names of the linear layers, such as `blocks.0.q`.
        header: of the file.
    """

    path: str
    family: Family
    pairs: dict[str, Pair]
    header: Header

    @property
    def name(self) -> str:
        """File name, for messages."""
        return os.path.basename(self.path)

    @property
    def blocks(self) -> int:
        """Number of transformer blocks that the LoRA changes."""
        return len({match["block"] for match in map(_BLOCK.fullmatch, self.pairs) if match})

    @property
    def ranks(self) -> list[int]:
        """The different ranks of its pairs."""
        return sorted({pair.rank for pair in self.pairs.values()})

    def tensors(self) -> dict[str, torch.Tensor]:
        """The LoRA as ComfyUI reads it: `diffusion_model.<module>.lora_A.weight` and `lora_B.weight`.

        Raises:
            ModelFileError: the file cannot be read or contains NaN or infinite values.
        """
        import torch
        from safetensors import SafetensorError, safe_open

        found = {}
        try:
            with safe_open(self.path, framework="pt", device="cpu") as file:
                for module, pair in self.pairs.items():
                    for half, stored in (("A", pair.down), ("B", pair.up)):
                        tensor = file.get_tensor(stored).clone()  # the tensor itself is memory-mapped
                        if not torch.isfinite(torch.stack(torch.aminmax(tensor.float()))).all():
                            raise ModelFileError(
                                self.path,
                                f"contains NaN or infinite values in {stored}.",
                                "Its training diverged, or the file is corrupted. Use another file.",
                            )
                        found[f"diffusion_model.{module}.lora_{half}.weight"] = tensor
        except (SafetensorError, OSError) as error:
            raise ModelFileError(self.path, f"cannot be read: {error}.", "Download it again.") from error
        return found


def read(path: str | os.PathLike[str]) -> LoraFile:
    """Read and check the header of a LoRA.

    Raises:
        ModelFileError: the file is not a complete LoRA for a model of `FAMILIES`.
    """
    header = read_header(path)
    if any(name.endswith(tensor_names.POSITIONS) for name in header.shapes):
        raise ModelFileError(
            path, "is an ExVideo extension for SVD, not a LoRA.", "Put it into models/exvideo and load it with "
            "Load ExVideo Extension.",
        )  # fmt: skip
    halves, others = _split(header)
    if not halves:
        raise ModelFileError(path, f"is not a LoRA that this node knows: it contains {listed(others)}.", _SOURCE)
    modules = [module for module, _ in halves.values()]
    family = max(FAMILIES, key=lambda each: sum(each.host_module(module) is not None for module in modules))
    unknown = [name for name, (module, _) in halves.items() if family.host_module(module) is None]
    if len(unknown) == len(halves):
        wanted = " or ".join(each.name for each in FAMILIES)
        raise ModelFileError(path, f"is a LoRA of another model than {wanted}: {listed(unknown)}.", _SOURCE)
    if unknown or others:
        raise ModelFileError(
            path,
            f"is a LoRA of {family.name}, but also contains {listed(sorted(unknown + others))}.",
            "Without these, the result would be a different one. Download the file again, or report these names.",
        )
    return LoraFile(os.fspath(path), family, _pairs(path, family, halves, header), header)


def _split(header: Header) -> tuple[dict[str, tuple[str, str]], list[str]]:
    """Names in a file -> (module, "A" or "B"), and the names that are no half of a LoRA."""
    halves, others = {}, []
    for name in header.shapes:
        prefix = next((each for each in _PREFIXES if name.startswith(each)), "")
        match = _HALF.fullmatch(name[len(prefix) :])
        if match is None:
            others.append(name)
        else:
            halves[name] = (match["module"], match["half"])
    return halves, others


def _pairs(
    path: str | os.PathLike[str], family: Family, halves: Mapping[str, tuple[str, str]], header: Header
) -> dict[str, Pair]:
    by_module: dict[str, dict[str, str]] = {}
    for name, (module, half) in halves.items():
        own = by_module.setdefault(family.host_module(module) or module, {})
        if half in own:
            raise ModelFileError(
                path, f"contains the same weights twice, as {own[half]} and {name}.", "Keep one and save it again."
            )
        own[half] = name
    again = "Download it again and compare its size to the original's."
    pairs = {}
    for module, own in by_module.items():
        if len(own) < 2:
            (half, name), missing = next(iter(own.items())), "B" if "A" in own else "A"
            partner = name.replace(f".lora_{half}.", f".lora_{missing}.")
            raise ModelFileError(path, f"is incomplete: it contains {name}, but not {partner}.", again)
        down, up = header.shapes[own["A"]], header.shapes[own["B"]]
        if len(down) != 2 or len(up) != 2 or down[0] != up[1]:
            raise ModelFileError(path, f"contains shapes that do not match: {own['A']} {down}, {own['B']} {up}.", again)
        pairs[module] = Pair(own["A"], own["B"], (up[0], down[1]), down[0])
    return pairs


def listed(names: list[str]) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return (", ".join(names[:_SHOWN]) or "nothing") + more
