"""A node that gives frames of a clip."""

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
            description="Fixes frames of the clip to given pictures, and leaves the others to the sampler: the last "
            "frame, stills in between, or the start that goes on from another clip. Nodes may follow one another. "
            "Leave ExVideo Normalize Latent out behind them: it would change the given frames too.",
            inputs=[
                io.Vae.Input("vae", tooltip="The VAE of the SVD checkpoint."),
                io.Latent.Input("latent", tooltip="The clip's latent, from ExVideo Conditioning."),
                io.Image.Input(
                    "images",
                    tooltip="A picture for each frame, in the order of frame_indices, or one for all. Scaled to cover "
                    "the clip and cut in the middle.",
                ),
                io.String.Input(
                    "frame_indices",
                    default="0",
                    tooltip="Frames to fix: numbers from 0, or from the end as -1, and ranges, such as '0-15, 64, -1'.",
                ),
                io.Int.Input(
                    "fade_frames",
                    default=0,
                    min=0,
                    max=MAX_FRAMES,
                    optional=True,
                    tooltip="Where several frames in a row are given: over so many of the last of them the hold fades, "
                    "so that they go over into what is made. For going on from a clip.",
                ),
            ],
            outputs=[
                io.Latent.Output(
                    display_name="latent",
                    tooltip="The latent with these frames in it, and a noise mask that keeps them.",
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
