"""Nodes that make the conditioning."""

from __future__ import annotations

from typing import TYPE_CHECKING

from comfy_api.v0_0_2 import io

from .checks import checked
from .types import MAX_FRAMES

if TYPE_CHECKING:
    import torch
    from comfy.clip_vision import ClipVisionModel
    from comfy.sd import VAE

_MAX_RESOLUTION = 16384  # the host's own limit


class ExVideoConditioning(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ExVideoConditioning",
            display_name="ExVideo Conditioning",
            category="ExVideo",
            description="Makes SVD's conditioning from the clip's first picture, as the ExVideo reference does, and "
            "the empty latent of the clip. The same seed gives the same conditioning.",
            inputs=[
                io.ClipVision.Input("clip_vision", tooltip="The image encoder of the SVD checkpoint."),
                io.Vae.Input("vae", tooltip="The VAE of the SVD checkpoint."),
                io.Image.Input("image", tooltip="The first picture of the clip (of a batch, the first)."),
                io.Int.Input(
                    "width",
                    default=512,
                    min=64,
                    max=_MAX_RESOLUTION,
                    step=8,
                    tooltip="Width of the clip in pixels. The picture is scaled to cover it and cut in the middle.",
                ),
                io.Int.Input(
                    "height", default=512, min=64, max=_MAX_RESOLUTION, step=8, tooltip="Height of the clip in pixels."
                ),
                io.Int.Input(
                    "frames",
                    default=128,
                    min=1,
                    max=MAX_FRAMES,
                    tooltip="Frames of the clip. ExVideo-SVD-128f-v1 is trained for 128.",
                ),
                io.Int.Input("fps", default=30, min=1, max=1024, tooltip="Frame rate that the motion is made for."),
                io.Int.Input(
                    "motion_bucket_id",
                    default=127,
                    min=0,
                    max=1023,
                    tooltip="Amount of motion: higher moves more. 127 is SVD's default.",
                ),
                io.Float.Input(
                    "noise_aug_strength",
                    default=0.02,
                    min=0.0,
                    max=10.0,
                    step=0.01,
                    tooltip="Noise added to the picture, on its -1..1 scale. More of it follows the picture less.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="Seed of the noise on the picture.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive", tooltip="Conditioning on the picture."),
                io.Conditioning.Output(display_name="negative", tooltip="Conditioning on no picture."),
                io.Latent.Output(display_name="latent", tooltip="An empty latent of the clip's frames and size."),
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
