"""The reference's own code as an oracle: modules of the installed `diffsynth` package, without its `__init__`.

The package's `__init__` imports everything it has; the few modules needed here import only torch and einops.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
import types
from collections.abc import Mapping
from pathlib import Path

import torch

_PACKAGE = "diffsynth_reference"


def _package(name: str, folder: Path) -> None:
    if name not in sys.modules:
        package = types.ModuleType(name)
        package.__path__ = [str(folder)]
        sys.modules[name] = package


def _root() -> Path:
    spec = importlib.util.find_spec("diffsynth")
    assert spec is not None and spec.submodule_search_locations, "install diffsynth==1.1.9 with --no-deps"
    return Path(next(iter(spec.submodule_search_locations)))


def module(name: str) -> types.ModuleType:
    """A module of the reference, such as `schedulers.continuous_ode`."""
    folder = name.rpartition(".")[0]
    _package(_PACKAGE, _root())
    _package(f"{_PACKAGE}.{folder}", _root() / folder)
    return importlib.import_module(f"{_PACKAGE}.{name}")


def method_holder(name: str, class_name: str, bases: Mapping[str, object]) -> type:
    """A class of a module whose imports are not all installed, compiled alone with `bases` as its globals."""
    source = (_root() / (name.replace(".", "/") + ".py")).read_text(encoding="utf-8")
    match = re.search(rf"^class {class_name}\b.*?(?=^class |\Z)", source, re.MULTILINE | re.DOTALL)
    assert match is not None
    scope: dict[str, object] = dict(bases)
    exec(compile(match.group(0), name, "exec"), scope)  # noqa: S102
    found = scope[class_name]
    assert isinstance(found, type)
    return found


def narrow_unet(divisor: int) -> types.ModuleType:
    """The reference's UNet module with every width, and every count of 64-wide heads, divided.

    Its widths are literals of the constructor; context (1024) and time-id widths (256, 768) stay.
    """
    module("models.svd_unet")
    source = (_root() / "models/svd_unet.py").read_text(encoding="utf-8")
    start, end = source.index("class SVDUNet("), source.index("    def build_mask", source.index("class SVDUNet("))
    body = source[start:end]
    body = re.sub(r"\b(320|640|960|1280|1920|2560)\b", lambda m: str(int(m.group()) // divisor), body)
    body = re.sub(r"(AttentionBlock\()(5|10|20),", lambda m: f"{m[1]}{int(m[2]) // divisor},", body)
    narrow = types.ModuleType(f"{_PACKAGE}.models.svd_unet_narrow")
    narrow.__package__ = f"{_PACKAGE}.models"
    exec(compile(source[:start] + body + source[end:], "svd_unet_narrow", "exec"), narrow.__dict__)  # noqa: S102
    return narrow


def extended_unet(
    checkpoint: Mapping[str, torch.Tensor], extension: Mapping[str, torch.Tensor], divisor: int, dtype: torch.dtype
) -> torch.nn.Module:
    """The reference's UNet with an SVD checkpoint's weights (`model.diffusion_model.*`), an extension's over them."""
    unet_module = narrow_unet(divisor)
    frames = extension["blocks.7.positional_embedding.embeddings"].shape[0]
    unet = unet_module.SVDUNet(add_positional_conv=frames).eval().requires_grad_(False)
    converted = unet_module.SVDUNet.state_dict_converter().from_civitai(dict(checkpoint))
    weights = {**converted, **extension}
    missing, unexpected = unet.load_state_dict(weights, strict=False)
    assert not missing and not unexpected, (missing[:3], unexpected[:3])
    return unet.to(dtype)
