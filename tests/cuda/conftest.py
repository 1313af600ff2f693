"""Puts one ComfyUI, named by EXVIDEO_HOST, before everything else on the path, on the GPU."""

from __future__ import annotations

import importlib.util
import os
import sys

import pytest

sys.path.insert(0, os.environ["EXVIDEO_HOST"])

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing(False)

_HAS_DYNAMIC_VRAM = importlib.util.find_spec("comfy_aimdo") is not None
if _HAS_DYNAMIC_VRAM:
    import comfy_aimdo.control

    comfy_aimdo.control.init()  # before PyTorch, as the host's main.py
import torch  # noqa: E402

if not torch.cuda.is_available():
    pytest.exit("the cuda tier needs a CUDA GPU", returncode=1)


@pytest.fixture(scope="session")
def dynamic_vram() -> bool:
    """Whether the host's dynamic VRAM runs on this card."""
    import comfy.model_management

    if not _HAS_DYNAMIC_VRAM or importlib.util.find_spec("comfy.memory_management") is None:
        return False
    devices = comfy.model_management.get_all_torch_devices()
    return bool(comfy_aimdo.control.init_devices((device.index, 2**29) for device in devices))


@pytest.fixture(autouse=True)
def full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 that is float32: PyTorch's convolutions take TF32 otherwise."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
