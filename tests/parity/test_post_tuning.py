"""The diffusers side against the reference: its UNet reads our extensions, and its loss is ours."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import reference
from exvideo_core.diffusers import names, patch
from exvideo_core.method.extension import Extension
from exvideo_core.post_tuning import loss
from exvideo_core.post_tuning.selection import select, untrained

WIDTHS = (64, 128, 256, 256)
DIVISOR = 5
FRAMES = 30


def unet(seed: int = 0):
    """A random SVD UNet of a fifth of the width, which the reference's code can be narrowed to."""
    from diffusers import UNetSpatioTemporalConditionModel

    torch.manual_seed(seed)
    return UNetSpatioTemporalConditionModel(
        block_out_channels=WIDTHS, num_attention_heads=(1, 2, 4, 4), num_frames=25
    ).eval()


def trained(model, frames: int = FRAMES) -> Extension:
    """An extension that differs from the base in every tensor."""
    torch.manual_seed(1)
    tensors = untrained(model, frames).tensors()
    return Extension.from_tensors(
        "trained", {name: value + 0.02 * torch.randn_like(value) for name, value in tensors.items()}
    )


def inputs(frames: int = FRAMES, size: int = 16) -> dict[str, torch.Tensor]:
    torch.manual_seed(2)
    return {
        "latents": torch.randn(1, frames, 4, size, size),
        "noise": torch.randn(1, frames, 4, size, size),
        "first": torch.randn(1, 4, size, size),
        "embedding": torch.randn(1, 1, 1024),
        "ids": torch.tensor([[29.0, 127.0, 0.0]]),
    }


def oracle(base, path: Path) -> torch.nn.Module:
    """The reference's UNet: the base's weights, and over them those that it reads from an extension's file."""
    from safetensors.torch import load_file

    checkpoint = {names.UNET_PREFIX + k: v for k, v in names.unet_to_svd(base.state_dict()).items()}
    return reference.extended_unet(checkpoint, load_file(path), DIVISOR, torch.float32)


def test_the_reference_computes_the_same_with_a_saved_extension(tmp_path: Path) -> None:
    model, given = unet(), inputs()
    path = tmp_path / "extension.safetensors"
    extension = trained(model)
    extension.save(path, torch.float32)
    theirs = oracle(model, path)
    patch.apply(model, Extension.load(path))
    condition = given["first"][:, None].expand(-1, FRAMES, -1, -1, -1)
    sample = torch.cat([given["latents"], condition], dim=2)
    with torch.no_grad():
        ours = model(sample, torch.tensor([0.7]), given["embedding"], given["ids"], return_dict=False)[0]
        expected = theirs(sample[0], 0.7, given["embedding"][0], given["ids"])
    assert ((ours[0] - expected).norm() / expected.norm()).item() < 5e-5


def test_the_untrained_extension_is_what_the_reference_starts_from() -> None:
    model = unet()
    checkpoint = {names.UNET_PREFIX + k: v for k, v in names.unet_to_svd(model.state_dict()).items()}
    theirs = reference.narrow_unet(DIVISOR).SVDUNet
    expected = theirs.state_dict_converter().from_civitai(dict(checkpoint))
    tables = theirs(add_positional_conv=80).state_dict()
    found = untrained(model, 80).tensors()
    assert len(found) == 528
    for name, value in found.items():
        if "positional_conv" in name:  # its converter writes this out for the full width only
            identity = torch.zeros_like(value)
            if name.endswith("weight"):
                identity[:, :, 1, 1, 1] = torch.eye(len(value))
            assert value.equal(identity), name
        elif name.endswith("positional_embedding.embeddings"):
            torch.testing.assert_close(value, tables[name], rtol=0, atol=1e-5)
        else:
            assert value.equal(expected[name]), name


@pytest.mark.parametrize("index", [40, 500, 900])
def test_loss_and_one_step_are_the_reference_formulas(tmp_path: Path, index: int) -> None:
    """Its scheduler's noising, its denoised estimate, MSE x its training weight, on its own UNet, by AdamW."""
    scheduler = reference.module("schedulers.continuous_ode").ContinuousODEScheduler(num_inference_steps=1000)
    frames = 6
    given = inputs(frames)
    model = unet()
    path = tmp_path / "extension.safetensors"
    extension = trained(model, frames)
    extension.save(path, torch.float32)
    theirs = oracle(model, path)

    timestep = scheduler.timesteps[index]
    noisy = scheduler.add_noise(given["latents"][0], given["noise"][0], timestep)
    tuned = {name: value for name, value in theirs.named_parameters() if name in extension.tensors()}
    for value in tuned.values():
        value.requires_grad_(True)
    prediction = theirs(
        torch.cat([noisy, given["first"].expand(frames, -1, -1, -1)], dim=1),
        timestep.item(), given["embedding"][0], given["ids"],
    )  # fmt: skip
    denoised = scheduler.step(prediction, timestep, noisy.clone(), to_final=True)
    expected = torch.nn.functional.mse_loss(denoised, given["latents"][0] * 1.01) * scheduler.training_weight(timestep)
    expected.backward()
    gradients = {name: value.grad.clone() for name, value in tuned.items()}
    torch.optim.AdamW(tuned.values(), lr=1e-5).step()

    patch.apply(model, extension)
    groups = select(model, positions=True, convolution=True, attention=True)
    sigma = loss.sigma_ramp()[index][None]
    level = sigma.view(1, 1, 1, 1, 1)
    clean = loss.denoise(
        model, given["latents"] + given["noise"] * level, sigma, given["first"], given["embedding"], given["ids"]
    )
    _, ours = loss.post_tuning_loss(clean, given["latents"], sigma, contrast=1.01)
    ours.backward()
    torch.testing.assert_close(ours, expected, rtol=2e-5, atol=0)
    found = patch.collect(model, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}).tensors()
    assert set(found) == set(gradients) and len(found) == 528
    difference = sum((found[n] - g).square().sum() for n, g in gradients.items()).sqrt()
    assert difference / sum(g.square().sum() for g in gradients.values()).sqrt() < 1e-4

    before = {name: value.clone() for name, value in extension.tensors().items()}
    torch.optim.AdamW([p for group in groups.values() for p in group], lr=1e-5).step()
    after = patch.collect(model).tensors()
    moved = sum((after[n] - before[n]).square().sum() for n in before).sqrt()
    apart = sum((after[n] - tuned[n].detach()).square().sum() for n in before).sqrt()
    # AdamW's first step is the gradient's sign: where a gradient is zero but for rounding, signs may differ.
    assert 0 < apart / moved < 0.02
