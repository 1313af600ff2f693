"""The node that fixes frames of a video."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from comfy_api.v0_0_2 import io

from .checks import checked
from .types import MAX_FRAMES

if TYPE_CHECKING:
    import torch
    from comfy.sd import VAE


class ExVideoKeyframes(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ExVideoKeyframes",
            display_name="ExVideo Keyframes",
            category="ExVideo",
            description="Fixes selected frames to given images and lets the sampler generate the rest: the last "
            "frame, images in between, or a start that continues another video. You can chain several of these "
            "nodes. Do not use ExVideo Normalize Latent after them: it would change the fixed frames, too.",
            inputs=[
                io.Vae.Input("vae", tooltip="The VAE of the SVD checkpoint."),
                io.Latent.Input("latent", tooltip="The latent of the video, from ExVideo Conditioning."),
                io.Image.Input(
                    "images",
                    tooltip="One image per frame, in the order of frame_indices, or a single image for all of them. "
                    "Images are resized to cover the video and center-cropped.",
                ),
                io.String.Input(
                    "frame_indices",
                    default="0",
                    tooltip="Frames to fix, counted from 0, or from the end with negative numbers (-1 is the last "
                    "frame). Separate them with commas and use ranges where needed, such as '0-15, 64, -1'.",
                ),
                io.Int.Input(
                    "fade_frames",
                    default=0,
                    min=0,
                    max=MAX_FRAMES,
                    optional=True,
                    tooltip="When you fix several frames in a row, gradually releases this many of the last ones, so "
                    "that they blend into the generated frames. Use it to continue a video.",
                ),
            ],
            outputs=[
                io.Latent.Output(
                    display_name="latent",
                    tooltip="The latent with the fixed frames in it, and a noise mask that preserves them.",
                )
            ],
        )

    @classmethod
    @checked
    def execute(
        cls, vae: VAE, latent: dict[str, Any], images: torch.Tensor, frame_indices: str, fade_frames: int = 0
    ) -> io.NodeOutput:
        from ..exvideo_core.comfyui.vae.keyframes import set_keyframes
        from ..exvideo_core.video.frame_indices import frame_indices as parse
        from ..exvideo_core.video.latents import check_latents

        check_latents(latent["samples"], 4)
        frames = parse(frame_indices, len(latent["samples"]))
        return io.NodeOutput(set_keyframes(vae, latent, images, frames, fade_frames))
