"""Draws a first frame for the small model included with the pack."""

from __future__ import annotations

from comfy_api.v0_0_2 import io

from .checks import checked


class ExVideoExamplePicture(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ExVideoExamplePicture",
            display_name="ExVideo Example Picture",
            category="ExVideo/example",
            description="Draws a first frame for exvideo_small, the small model included with this pack: two lanes "
            "with a disk or a square in each. Whether a shape starts to the left or to the right depends on the "
            "sampler's seed.",
            inputs=[
                io.Int.Input(
                    "seed",
                    default=10_000_000,
                    min=0,
                    max=0xFFFFFFFF,
                    control_after_generate=True,
                    tooltip="Determines positions, shapes, colors and speed. Training used seeds below 10,000,000.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="image", tooltip="The image, 64x64 pixels."),
                io.Int.Output(
                    display_name="motion_bucket_id", tooltip="Speed of the motion: 40 is slow, 100 medium, 160 fast."
                ),
            ],
        )

    @classmethod
    @checked
    def execute(cls, seed: int) -> io.NodeOutput:
        import torch

        from ..small_model import world

        clip = world.sample(seed)
        return io.NodeOutput(torch.from_numpy(world.render(clip, 1)), clip.motion_bucket)
