"""Puts one ComfyUI, named by EXVIDEO_HOST, before everything else on the path and starts it on the CPU."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

HOST = Path(os.environ["EXVIDEO_HOST"])
sys.path[:0] = [str(HOST), str(Path(__file__).parent)]

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing(False)
import comfy.cli_args  # noqa: E402

comfy.cli_args.args.cpu = True


@pytest.fixture(scope="session")
def host_path() -> Path:
    return HOST


@pytest.fixture(scope="session")
def small_models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The quickstart's checkpoint and extension, in a models folder."""
    import random_model

    return random_model.make(tmp_path_factory.mktemp("models"))
