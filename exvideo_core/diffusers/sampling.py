"""Generates videos with diffusers' `StableVideoDiffusionPipeline`, with or without an extension."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from diffusers import EulerDiscreteScheduler, StableVideoDiffusionPipeline
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from transformers import CLIPImageProcessor

from ..method.noise_levels import SIGMA_MAX, SIGMA_MIN
from ..video.blending import segment_weights, split_segments
from .checkpoint import SVD

Sampler = Literal["euler", "lcm"]


class EDMLCMScheduler(EulerDiscreteScheduler):
    """ComfyUI's sampler `lcm` on SVD's noise levels: every step adds new noise to the predicted clean latents.

    This is multistep consistency sampling (Song et al. 2023, arXiv 2303.01469, algorithm 1). diffusers' own
    `LCMScheduler` has the noise levels of Stable Diffusion.

    Attributes:
        generators: one per video. Without them, the noise is from PyTorch's default generator.
    """

    generators: list[torch.Generator] | None = None

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        **_: Any,  # noqa: ANN401 - options of Euler's step
    ) -> EulerDiscreteSchedulerOutput:
        """Denoise one step: x_{i+1} = D(x_i) + sigma_{i+1} noise."""
        clean = super().step(model_output, timestep, sample).pred_original_sample
        sigma = self.sigmas[self.step_index]  # Euler's step has moved on to the next level
        if sigma == 0:
            return EulerDiscreteSchedulerOutput(clean, clean)
        noise = randn_tensor(clean.shape, self.generators, clean.device, clean.dtype)
        return EulerDiscreteSchedulerOutput(clean + noise * sigma.to(clean), clean)


def pipeline(
    svd: SVD, sigmas: tuple[float, float] = (SIGMA_MAX, SIGMA_MIN), sampler: Sampler = "euler"
) -> StableVideoDiffusionPipeline:
    """Build diffusers' pipeline with SVD's Karras noise levels, and its scheduler unless another is requested."""
    kind = EDMLCMScheduler if sampler == "lcm" else EulerDiscreteScheduler
    scheduler = kind(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        interpolation_type="linear",
        use_karras_sigmas=True,
        sigma_min=sigmas[1],
        sigma_max=sigmas[0],
        timestep_spacing="leading",
        timestep_type="continuous",
        steps_offset=1,
    )
    size = svd.image_encoder.config.image_size
    processor = CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    return StableVideoDiffusionPipeline(svd.vae, svd.image_encoder, svd.unet, scheduler, processor)


@torch.no_grad()
def generate_videos(
    svd: SVD,
    images: torch.Tensor,
    *,
    seeds: Sequence[int],
    frames: int,
    fps: int = 30,
    motion_bucket_id: int = 127,
    noise_aug_strength: float = 0.02,
    steps: int = 25,
    guidance: tuple[float, float] = (1.0, 1.0),
    sigmas: tuple[float, float] = (SIGMA_MAX, SIGMA_MIN),
    sampler: Sampler = "euler",
    noise: torch.Tensor | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """Generate one video from each of N images.

    Args:
        svd: the model, with or without an extension (`patch.apply`).
        images: the first frames [N, H, W, 3] in 0..1, in the size of the videos.
        seeds: one seed of the noise per video.
        frames: length of the videos.
        fps: frame rate that the model is conditioned on.
        motion_bucket_id: amount of motion that the model is conditioned on, 0 to 127 in training.
        noise_aug_strength: noise added to the images that condition the model.
        steps: number of denoising steps.
        guidance: classifier-free guidance scale of the first and last frame.
        sigmas: noise levels of the first and the last step.
        sampler: SVD's own, or `EDMLCMScheduler`.
        noise: initial noise of unit variance instead of the seeds' [N, frames, 4, H / 8, W / 8].
        progress: called with (finished step, steps) after each step; an exception cancels the run.

    Returns:
        uint8 [N, frames, H, W, 3].
    """

    def on_step_end(_: object, index: int, __: object, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if progress is not None:
            progress(index + 1, steps)
        return tensors

    pipe = pipeline(svd, sigmas, sampler)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    if isinstance(pipe.scheduler, EDMLCMScheduler):
        pipe.scheduler.generators = generators
    pipe.set_progress_bar_config(disable=True)
    height, width = images.shape[1:3]
    # PIL images, because the pipeline does not resize tensors for CLIP.
    pixels = (images * 255).round().clamp(0, 255).byte().cpu().numpy()
    result = pipe(
        [Image.fromarray(image) for image in pixels],
        height=height,
        width=width,
        num_frames=frames,
        num_inference_steps=steps,
        min_guidance_scale=guidance[0],
        max_guidance_scale=guidance[1],
        fps=fps,
        motion_bucket_id=motion_bucket_id,
        noise_aug_strength=noise_aug_strength,
        generator=generators,
        latents=noise,
        callback_on_step_end=on_step_end,
        output_type="latent",
    )
    return (decode(svd, result.frames) * 255).round().astype(np.uint8)


def generate_video(svd: SVD, image: torch.Tensor, *, seed: int = 0, **options: Any) -> np.ndarray:
    """Generate a video from an image [1, H, W, 3]: `generate_videos` for a single one.

    Returns:
        uint8 [frames, H, W, 3].
    """
    return generate_videos(svd, image, seeds=[seed], **options)[0]


@torch.no_grad()
def decode(svd: SVD, latents: torch.Tensor, segment_frames: int = 24, overlap_frames: int = 12) -> np.ndarray:
    """Decode videos in overlapping segments, as the ExVideo Decode node does by default.

    The pipeline's own chunks do not overlap, so that images jump from one chunk to the next.

    Args:
        svd: the model.
        latents: the UNet's latents of one or several videos, scaled by the VAE's factor [..., T, 4, H, W].
        segment_frames: frames per segment.
        overlap_frames: frames that neighboring segments share.

    Returns:
        float32 [..., T, 8 H, 8 W, 3] in 0..1.
    """
    *videos, frames, _, height, width = latents.shape
    unscaled = latents.reshape(-1, *latents.shape[-4:]) / svd.vae.config.scaling_factor
    decoded = torch.zeros(len(unscaled), frames, 3, 8 * height, 8 * width)
    weight_sum = torch.zeros(frames, 1, 1, 1)
    for start, end in split_segments(frames, segment_frames, overlap_frames):
        segment = unscaled[:, start:end].flatten(0, 1)
        pixels = svd.vae.decode(segment, num_frames=end - start).sample.float().cpu()
        weights = segment_weights(start, end, frames, overlap_frames, "smooth").view(-1, 1, 1, 1)
        decoded[:, start:end] += pixels.unflatten(0, (-1, end - start)) * weights
        weight_sum[start:end] += weights
    decoded = ((decoded / weight_sum + 1) / 2).clamp(0, 1).movedim(2, -1)
    return decoded.reshape(*videos, *decoded.shape[1:]).numpy()
