"""A tiny SVD with random weights, a folder of videos, and the command line of a run on them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

PACK = Path(__file__).resolve().parents[2]
FRAMES = 6


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SVD of 32 channels in every part, as a single file in float32."""
    from diffusers import AutoencoderKLTemporalDecoder, UNetSpatioTemporalConditionModel
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    from exvideo_core.hosts.diffusers.checkpoint import SVD, save

    torch.manual_seed(0)
    unet = UNetSpatioTemporalConditionModel(
        block_out_channels=(32,) * 4, num_attention_heads=1, cross_attention_dim=32, num_frames=25
    )
    vae = AutoencoderKLTemporalDecoder(
        block_out_channels=(32,) * 4, down_block_types=("DownEncoderBlock2D",) * 4, layers_per_block=1
    )
    torch.nn.init.dirac_(vae.quant_conv.weight)  # an SVD file has no place for another one
    torch.nn.init.zeros_(vae.quant_conv.bias)
    encoder = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=224,
            patch_size=56, projection_dim=32, hidden_act="gelu",
        )
    )  # fmt: skip
    path = tmp_path_factory.mktemp("base") / "svd.safetensors"
    save(SVD(unet, vae, encoder), path, torch.float32)
    return path


@pytest.fixture(scope="session")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from small_model import videos as writer

    folder = tmp_path_factory.mktemp("videos")
    writer.write(folder, clips=4, frames=10)
    return folder


class Run:
    """A run of the command line, in a process of its own."""

    def __init__(self, base: Path, videos: Path, out: Path, **settings: object) -> None:
        self.out = out
        given = {
            "base": base, "data": videos, "out": out, "frames": FRAMES, "width": 64, "height": 64, "steps": 6,
            "save_every": 2, "ema_every": 2, "log_every": 1, "learning_rate": 1e-3, "mixed_precision": "no",
        } | settings  # fmt: skip
        self.arguments = ["-m", "exvideo_core.post_tuning"]
        for name, value in given.items():
            option = f"--{name.replace('_', '-')}"
            if isinstance(value, bool):
                self.arguments.append(option if value else option.replace("--", "--no-", 1))
            else:
                self.arguments += [option, str(value)]

    def start(self, processes: int = 1, quiet: bool = False) -> subprocess.Popen[str]:
        environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(PACK)}
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command = [sys.executable, *(launcher if processes > 1 else []), *self.arguments]
        output = subprocess.DEVNULL if quiet else subprocess.PIPE
        return subprocess.Popen(command, cwd=PACK, env=environment, stdout=output, stderr=subprocess.STDOUT, text=True)

    def finish(self, processes: int = 1) -> str:
        """Run to its end; what it printed."""
        process = self.start(processes)
        text, _ = process.communicate(timeout=600)
        assert process.returncode == 0, text[-3000:]
        return text

    def weights(self) -> dict[str, torch.Tensor]:
        from safetensors.torch import load_file

        return load_file(self.out / "extension.safetensors")

    def checkpoint(self) -> dict[str, torch.Tensor]:
        """The newest checkpoint's trained weights, in float32."""
        from safetensors.torch import load_file

        newest = sorted((self.out / "checkpoints").glob("step-????????"))[-1]
        return load_file(newest / "trained.safetensors")


@pytest.fixture
def run(base: Path, videos: Path, tmp_path: Path):
    def make(name: str = "run", data: Path = videos, **settings: object) -> Run:
        return Run(base, data, tmp_path / name, **settings)

    return make
