"""What a model file is, and what the pack's nodes would do with it: `python run.py check FILE`."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

from exvideo_core.files.safetensors_header import Header, ModelFileError, read_header
from exvideo_core.method import cogvideox, lora, tensor_names
from exvideo_core.method.extension import Extension, format_widths, guess_kind

_SHOWN = 3


def describe(path: Path) -> list[str]:
    """Lines about a file.

    Raises:
        ModelFileError: no node of this pack can use it.
    """
    header = read_header(path)
    if any(name.endswith(tensor_names.POSITIONS) for name in header.shapes):
        return _extension(path)
    names = [name for name in header.shapes if ".lora_" not in name]
    if names and all(map(cogvideox.host_name, names)):
        return _transformer(path)
    kind = guess_kind(header.shapes)
    if "SVD checkpoint" in kind:
        return [f"{kind}, {len(header.shapes)} tensors, {_dtypes(header)}", "Load SVD Checkpoint (ExVideo) reads it"]
    return _lora(lora.read(path))


def _extension(path: Path) -> list[str]:
    extension = Extension.load(path)
    return [
        f"ExVideo extension for SVD, {extension.frames} frames, {extension.dtype}",
        *([f"distilled for {extension.few_steps}"] if extension.few_steps else []),
        f"block widths {format_widths(extension.widths)}, image embedding {extension.context_dim}",
        "Load ExVideo Extension reads it from models/exvideo, ExVideo Apply applies it to an SVD model of these widths",
    ]


def _transformer(path: Path) -> list[str]:
    header = cogvideox.check_diffusers_transformer(path)
    names = list(header.shapes)[:_SHOWN]
    files = cogvideox.shards(path)
    return [
        f"CogVideoX transformer in diffusers' layout, {len(header.shapes)} tensors, {_dtypes(header)}",
        *(f"{name} {header.shapes[name]} -> {cogvideox.host_name(name)}" for name in names),
        f"Load CogVideoX (ExVideo) reads it from models/diffusion_models ({len(files)} file{'s'[: len(files) > 1]})",
    ]


def _lora(file: lora.LoraFile) -> list[str]:
    published = file.family
    widths = {size for pair in file.pairs.values() for size in pair.shape}
    fits = file.blocks == published.blocks and published.width in widths
    shown = list(file.pairs.items())[:_SHOWN]
    return [
        f"LoRA for {published.name}, rank {', '.join(map(str, file.ranks))}, {_dtypes(file.header)}",
        f"{len(file.pairs)} weights in {file.blocks} blocks, and every one of the {2 * len(file.pairs)} keys is used",
        *(f"{pair.up} {file.header.shapes[pair.up]} -> {module} {pair.shape}" for module, pair in shown),
        f"{'fits' if fits else 'does not fit'} the published model ({published.blocks} blocks of {published.width})",
        "Load ExVideo LoRA reads it from models/loras and adds strength * lora_B @ lora_A to each weight",
    ]


def _dtypes(header: Header) -> str:
    return ", ".join(name for name, _ in Counter(header.dtypes.values()).most_common())


def main() -> int:
    path = Path(sys.argv[1])
    try:
        lines = describe(path)
    except ModelFileError as error:
        print(error, file=sys.stderr)
        return 1
    print("\n".join([f"{path.name} ({path.stat().st_size / 1e6:,.1f} MB)", *(f"  {line}" for line in lines)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
