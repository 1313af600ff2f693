"""Puts one ComfyUI, named by EXVIDEO_HOST, before everything else on the path, on the GPU."""

from __future__ import annotations

import contextlib
import os
import sys

import pytest

sys.path.insert(0, os.environ["EXVIDEO_HOST"])

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing(False)

_control = None
with contextlib.suppress(ImportError):  # ComfyUI 0.3.64 has no dynamic VRAM
    import comfy_aimdo.control as _control

    _control.init()  # before PyTorch is imported, as in the host's main.py
import torch  # noqa: E402

if not torch.cuda.is_available():
    pytest.exit("the cuda tier needs a CUDA GPU", returncode=1)
torch.backends.cudnn.allow_tf32 = False  # what is compared in fp32 is computed in fp32


@pytest.fixture
def dynamic_vram(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamic VRAM, as the host switches it on."""
    if _control is None or not _control.init_devices([0]):
        pytest.skip("dynamic VRAM loading is not available here")
    monkeypatch.setattr("comfy.memory_management.aimdo_enabled", True)
