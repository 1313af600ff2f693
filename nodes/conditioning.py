"""The node that creates the conditioning."""

from __future__ import annotations

from typing import TYPE_CHECKING

from comfy_api.v0_0_2 import io

from .checks import checked
from .types import MAX_FRAMES

if TYPE_CHECKING:
    import torch
    from comfy.clip_vision import ClipVisionModel
    from comfy.sd import VAE

_MAX_RESOLUTION = 16384  # ComfyUI's own limit


class ExVideoConditioning(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ExVideoConditioning",
            display_name="ExVideo Conditioning",
            category="ExVideo",
            description="Encodes the first frame into SVD conditioning, as the ExVideo reference does, and creates "
            "the empty latent of the video. The same seed gives the same conditioning.",
            inputs=[
                io.ClipVision.Input("clip_vision", tooltip="The image encoder of the SVD checkpoint."),
                io.Vae.Input("vae", tooltip="The VAE of the SVD checkpoint."),
                io.Image.Input(
                    "image", tooltip="The first frame of the video. Only the first image of a batch is used."
                ),
                io.Int.Input(
                    "width",
                    default=512,
                    min=64,
                    max=_MAX_RESOLUTION,
                    step=8,
                    tooltip="Width of the video in pixels. The image is resized to cover it and center-cropped.",
                ),
                io.Int.Input(
                    "height", default=512, min=64, max=_MAX_RESOLUTION, step=8, tooltip="Height of the video in pixels."
                ),
                io.Int.Input(
                    "frames",
                    default=128,
                    min=1,
                    max=MAX_FRAMES,
                    tooltip="Number of frames to generate. ExVideo-SVD-128f-v1 is trained for 128.",
                ),
                io.Int.Input("fps", default=30, min=1, max=1024, tooltip="Frame rate the motion is generated for."),
                io.Int.Input(
                    "motion_bucket_id",
                    default=127,
                    min=0,
                    max=1023,
                    tooltip="Amount of motion. Higher values move more; 127 is SVD's default.",
                ),
                io.Float.Input(
                    "noise_aug_strength",
                    default=0.02,
                    min=0.0,
                    max=10.0,
                    step=0.01,
                    tooltip="Strength of the noise added to the image, on its -1..1 scale. Higher values follow the "
                    "image less closely.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="Seed of the noise added to the image.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive", tooltip="Conditioning with the image."),
                io.Conditioning.Output(display_name="negative", tooltip="Conditioning without an image."),
                io.Latent.Output(
                    display_name="latent", tooltip="An empty latent with the length and size of the video."
                ),
            ],
        )

    @classmethod
    @checked
    def execute(
        cls,
        clip_vision: ClipVisionModel,
        vae: VAE,
        image: torch.Tensor,
        width: int,
        height: int,
        frames: int,
        fps: int,
        motion_bucket_id: int,
        noise_aug_strength: float,
        seed: int,
    ) -> io.NodeOutput:
        import torch

        from ..exvideo_core.comfyui.vae.conditioning import encode_conditioning

        positive, negative = encode_conditioning(
            clip_vision,
            vae,
            image,
            width=width,
            height=height,
            fps=fps,
            motion_bucket_id=motion_bucket_id,
            noise_aug_strength=noise_aug_strength,
            seed=seed,
        )
        return io.NodeOutput(positive, negative, {"samples": torch.zeros(frames, 4, height // 8, width // 8)})
