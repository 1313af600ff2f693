"""Puts one ComfyUI, named by EXVIDEO_HOST, before everything else on the path, on the GPU."""

from __future__ import annotations

import os
import sys

import pytest

sys.path.insert(0, os.environ["EXVIDEO_HOST"])

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing(False)
import torch  # noqa: E402

if not torch.cuda.is_available():
    pytest.exit("the cuda tier needs a CUDA GPU", returncode=1)
