"""A tiny SVD with random weights, and a folder of videos."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from training_run import Run


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SVD of 32 channels in every part, as a single file in float32."""
    from diffusers import AutoencoderKLTemporalDecoder, UNetSpatioTemporalConditionModel
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    from exvideo_core.diffusers.checkpoint import SVD, save

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


@pytest.fixture
def run(base: Path, videos: Path, tmp_path: Path):
    def make(name: str = "run", data: Path = videos, **settings: object) -> Run:
        return Run(base, data, tmp_path / name, **settings)

    return make
