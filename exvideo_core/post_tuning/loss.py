"""The published loss: denoised latents at a random noise level of the sampler's schedule (paper section 3.3)."""

from __future__ import annotations

from typing import Protocol

import torch

from ..method.noise_levels import karras

RAMP_STEPS = 1000


class VideoUNet(Protocol):
    """diffusers' `UNetSpatioTemporalConditionModel`, or a wrapper of it."""

    def __call__(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        added_time_ids: torch.Tensor,
        return_dict: bool,
    ) -> tuple[torch.Tensor]: ...


def sigma_ramp(steps: int = RAMP_STEPS) -> torch.Tensor:
    """The published ramp: SVD's Karras noise levels, highest first [steps], in float32."""
    return karras(steps)


def loss_weight(sigma: torch.Tensor) -> torch.Tensor:
    """Loss weight sqrt(1 + sigma^2) / sigma (the reference's `training_weight`), in the shape of `sigma`."""
    return (1 + sigma.square()).sqrt() / sigma


def denoise(
    unet: VideoUNet,
    noisy: torch.Tensor,
    sigma: torch.Tensor,
    first: torch.Tensor,
    embedding: torch.Tensor,
    ids: torch.Tensor,
) -> torch.Tensor:
    """Predict the clean latents (x0) from noisy ones: v-prediction in EDM's parametrization.

    Args:
        unet: the UNet.
        noisy: latents + sigma x noise [B, T, 4, H, W].
        sigma: noise levels [B].
        first: latents of the first frame, not scaled by the VAE's factor [B, 4, H, W].
        embedding: image embedding of the first frame [B, 1, D].
        ids: fps - 1, motion bucket, noise augmentation [B, 3].

    Returns:
        float32 [B, T, 4, H, W].
    """
    level = sigma.view(-1, 1, 1, 1, 1)
    spread = (level.square() + 1).sqrt()
    condition = first[:, None].expand(-1, noisy.shape[1], -1, -1, -1)
    model_input = torch.cat([noisy / spread, condition], dim=2)
    velocity = unet(model_input, 0.25 * sigma.log(), embedding, ids, return_dict=False)[0]
    return noisy / spread.square() - velocity.float() * (level / spread)


def post_tuning_loss(
    denoised: torch.Tensor, latents: torch.Tensor, sigma: torch.Tensor, contrast: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean squared error against the latents times `contrast`, unweighted and weighted by `loss_weight`.

    The reference scales the target by 1.01, because long videos turn gray otherwise.

    Args:
        denoised: predicted latents [B, T, 4, H, W].
        latents: clean latents [B, T, 4, H, W].
        sigma: noise levels [B].
        contrast: factor on the clean latents.

    Returns:
        (unweighted error, loss), both scalars.
    """
    errors = (denoised.float() - latents.float() * contrast).square().flatten(1).mean(1)
    return errors.mean(), (errors * loss_weight(sigma)).mean()
