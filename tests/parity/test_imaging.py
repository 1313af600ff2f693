"""Preprocessing, post-processing, blending and sampling facts against the reference's own code."""

from __future__ import annotations

import pytest
import torch
from einops import rearrange, repeat

import reference
from exvideo_core.method import positions, tensor_names
from exvideo_core.video.blending import segment_weights, split_segments
from exvideo_core.video.images import clip_vision_pixels
from exvideo_core.video.latents import normalize_latents


@pytest.mark.parametrize(("height", "width"), [(512, 512), (576, 1024), (300, 451), (224, 224), (128, 96)])
def test_clip_pixels(height: int, width: int) -> None:
    image = torch.rand(1, height, width, 3, generator=torch.Generator().manual_seed(0))
    processor = reference.method_holder("pipelines.svd_video", "SVDCLIPImageProcessor", {"torch": torch})()
    pixels = processor.resize_with_antialiasing(image.movedim(-1, 1) * 2 - 1, (224, 224))
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).reshape(1, 3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).reshape(1, 3, 1, 1)
    torch.testing.assert_close(clip_vision_pixels(image), ((pixels + 1) / 2 - mean) / std, rtol=0, atol=2e-5)


@pytest.mark.parametrize("normalize", [True, False])
def test_normalize_latents(normalize: bool) -> None:
    scope = {"torch": torch, "BasePipeline": object, "tqdm": None, "ContinuousODEScheduler": None}
    for name in ("ModelManager", "SVDImageEncoder", "SVDUNet", "SVDVAEEncoder", "SVDVAEDecoder"):
        scope[name] = object
    pipeline = reference.method_holder("pipelines.svd_video", "SVDVideoPipeline", scope)
    latents = torch.randn(9, 4, 6, 5) * torch.rand(9, 1, 1, 1) + torch.randn(9, 1, 1, 1)
    expected = pipeline.post_process_latents(None, latents.clone(), normalize, 1.2)
    torch.testing.assert_close(normalize_latents(latents, normalize, 1.2), expected)


def test_a_constant_frame_is_normalized_to_the_mean() -> None:
    latents = torch.randn(3, 4, 4, 4)
    latents[1] = 0.5
    found = normalize_latents(latents, True, 1.0)
    torch.testing.assert_close(found[1], latents.mean().expand(4, 4, 4))
    torch.testing.assert_close(found.mean((1, 2, 3)), latents.mean().expand(3))


@pytest.mark.parametrize("frames", [1, 7, 8, 9, 12, 13, 40, 128])
def test_chunks_and_blending(frames: int) -> None:
    """The reference's decoder with a stand-in for its network that tells frames by their place in the chunk."""

    class Decoder:
        conv_in = torch.nn.Conv2d(1, 1, 1)

        def forward(self, sample: torch.Tensor) -> torch.Tensor:
            big = sample[:3].repeat_interleave(8, 2).repeat_interleave(8, 3)
            return big + torch.arange(sample.shape[1]).view(1, -1, 1, 1)

    scope = {"torch": torch, "repeat": repeat, "rearrange": rearrange}
    scope |= dict.fromkeys(("Attention", "ResnetBlock", "UpSampler", "TemporalResnetBlock", "AttentionBlock"), object)
    svd_decoder = reference.method_holder("models.svd_vae_decoder", "SVDVAEDecoder", scope)
    Decoder.build_mask = svd_decoder.build_mask
    latents = torch.randn(frames, 4, 8, 8)
    expected = svd_decoder.decode_video(Decoder(), latents).movedim(0, 1)

    video = torch.zeros_like(expected)
    total = torch.zeros(frames, 1, 1, 1)
    for start, end in split_segments(frames, 8, 4):
        weights = segment_weights(start, end, frames, 4, "linear").view(-1, 1, 1, 1)
        video[start:end] += Decoder().forward(latents[start:end].movedim(0, 1)).movedim(0, 1) * weights
        total[start:end] += weights
    torch.testing.assert_close(video / total, expected)


def test_overlap_has_to_leave_a_step() -> None:
    with pytest.raises(ValueError, match="overlap_frames"):
        list(split_segments(10, 4, 4))


def test_untrained_positions_are_the_references() -> None:
    svd_unet = reference.module("models.svd_unet")
    theirs = svd_unet.TrainableTemporalTimesteps(320, True, 0, 128).embeddings.detach()
    ours = positions.sinusoidal(positions.ping_pong(128), 320)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6)


def test_layout_is_the_references() -> None:
    svd_unet = reference.narrow_unet(5)
    unet = svd_unet.SVDUNet(add_positional_conv=40)
    temporal = [i for i, block in enumerate(unet.blocks) if type(block).__name__ == "TemporalAttentionBlock"]
    assert tuple(temporal) == tensor_names.BLOCK_IDS
    theirs = {f"blocks.{i}.{n}": tuple(v.shape) for i in temporal for n, v in unet.blocks[i].state_dict().items()}
    widths = [unet.blocks[i].norm_in.weight.shape[0] for i in temporal]
    assert theirs == tensor_names.extension_shapes(widths, 1024, 40)


def test_shared_tensors_are_where_the_reference_puts_them() -> None:
    """An SVD checkpoint whose tensors hold their own number, through the reference's converter."""
    svd_unet = reference.narrow_unet(5)
    names = [
        f"model.diffusion_model.{transformer}.{svd}"
        for transformer in tensor_names.SVD_TRANSFORMERS
        for svd in tensor_names.SHARED_TENSORS.values()
    ]
    numbered = {name: torch.full((1, 1), float(number)) for number, name in enumerate(names)}
    converted = svd_unet.SVDUNet.state_dict_converter().from_civitai(numbered)
    for transformer, block in zip(tensor_names.SVD_TRANSFORMERS, tensor_names.BLOCK_IDS, strict=True):
        for ours, svd in tensor_names.SHARED_TENSORS.items():
            expected = numbered[f"model.diffusion_model.{transformer}.{svd}"]
            assert converted[f"blocks.{block}.{ours}"].equal(expected), (block, ours)
