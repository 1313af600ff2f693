"""Nodes that visualize extensions and denoising, and compare videos."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from comfy_api.v0_0_2 import io, ui

from ..exvideo_core.choices import DIRECTIONS, Direction
from .checks import checked
from .types import ExtensionSocket, RecordingSocket

if TYPE_CHECKING:
    import torch
    from comfy.model_patcher import ModelPatcher
    from comfy.sd import VAE

    from ..exvideo_core.comfyui.sampling.recording import Recording
    from ..exvideo_core.method.extension import Extension


class ExVideoPlot(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ExVideoPlot",
            display_name="ExVideo Plot Extension",
            category="ExVideo/pictures",
            description="Plots an extension: the frame positions it has learned, how similar frames look to it, and "
            "how far post-tuning has moved each block.",
            inputs=[
                ExtensionSocket.Input("extension", tooltip="The extension to plot."),
                io.Int.Input(
                    "block",
                    default=1,
                    min=1,
                    max=16,
                    tooltip="Block whose positions are plotted: 1 to 6 are in the UNet's input half, 7 is the middle "
                    "block, 8 to 16 are in the output half.",
                ),
                io.Model.Input(
                    "base",
                    optional=True,
                    tooltip="The SVD model that the extension was made for, straight from its checkpoint. Connect it "
                    "to plot the distance of the tuned weights as well.",
                ),
            ],
            outputs=[io.Image.Output(display_name="image", tooltip="The plot, also shown on the node.")],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
            is_output_node=True,
        )

    @classmethod
    @checked
    def execute(cls, extension: Extension, block: int, base: ModelPatcher | None = None) -> io.NodeOutput:
        from ..exvideo_core.comfyui.inspect import measure_distances
        from ..exvideo_core.video.charts import extension_chart

        image = _as_image(extension_chart(extension, measure_distances(extension, base), block - 1))
        return io.NodeOutput(image, ui=ui.PreviewImage(image, cls=cls))


class ExVideoRecord(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ExVideoRecord",
            display_name="ExVideo Record Denoising",
            category="ExVideo/pictures",
            description="Records the sampler's prediction of the finished video at some of its steps, for ExVideo "
            "Contact Sheet. The sampling result does not change.",
            inputs=[
                io.Model.Input("model", tooltip="The model for the sampler, after all other nodes that patch it."),
                io.Int.Input(
                    "steps",
                    default=4,
                    min=1,
                    max=64,
                    tooltip="Number of steps to record, evenly spaced and including the last one.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    display_name="model", tooltip="A copy of the model that records. The input model is not changed."
                ),
                RecordingSocket.Output(
                    display_name="recording",
                    tooltip="The recorded sampler runs with this model, for ExVideo Contact Sheet.",
                ),
            ],
        )

    @classmethod
    @checked
    def execute(cls, model: ModelPatcher, steps: int) -> io.NodeOutput:
        from ..exvideo_core.comfyui.sampling.recording import record_sampling

        return io.NodeOutput(*record_sampling(model, steps))


class ExVideoContactSheet(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ExVideoContactSheet",
            display_name="ExVideo Contact Sheet",
            category="ExVideo/pictures",
            description="Arranges frames of a video on one image. If you connect a recording, each recorded "
            "denoising step becomes a row above them.",
            inputs=[
                io.Vae.Input("vae", tooltip="The VAE of the SVD checkpoint."),
                io.Latent.Input("latent", tooltip="The latent of the video, from the sampler."),
                io.Int.Input(
                    "frames",
                    default=8,
                    min=1,
                    max=64,
                    tooltip="Frames per row, evenly spaced from the first frame to the last.",
                ),
                io.Int.Input(
                    "edge", default=128, min=16, max=1024, tooltip="Longest side of each frame on the sheet, in pixels."
                ),
                RecordingSocket.Input(
                    "recording",
                    optional=True,
                    tooltip="From the ExVideo Record Denoising node whose model generated this video.",
                ),
            ],
            outputs=[io.Image.Output(display_name="image", tooltip="The contact sheet, also shown on the node.")],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
            is_output_node=True,
        )

    @classmethod
    @checked
    def execute(
        cls, vae: VAE, latent: dict[str, Any], frames: int, edge: int, recording: Recording | None = None
    ) -> io.NodeOutput:
        from ..exvideo_core.comfyui.inspect import denoising_sheet

        image = _as_image(denoising_sheet(vae, latent["samples"], recording, frames, edge))
        return io.NodeOutput(image, ui=ui.PreviewImage(image, cls=cls))


class ExVideoCompare(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ExVideoCompare",
            display_name="ExVideo Compare",
            category="ExVideo/pictures",
            description="Combines two videos into one, side by side or one above the other. Compare, for example, "
            "the base model with the extension, two strengths, or two ways to go past the trained length. The "
            "shorter video freezes on its last frame.",
            inputs=[
                io.Image.Input("first", tooltip="The first video."),
                io.Image.Input("second", tooltip="The second video, of any length. It is resized to fit the first."),
                io.Combo.Input(
                    "direction",
                    options=list(DIRECTIONS),
                    default=DIRECTIONS[0],
                    tooltip="How the two videos are arranged.",
                ),
                io.String.Input(
                    "first_label",
                    default="",
                    optional=True,
                    tooltip="Label above the first video. Leave empty for none.",
                ),
                io.String.Input(
                    "second_label",
                    default="",
                    optional=True,
                    tooltip="Label above the second video. Leave empty for none.",
                ),
            ],
            outputs=[io.Image.Output(display_name="image", tooltip="The combined frames, for Create Video.")],
        )

    @classmethod
    def execute(
        cls,
        first: torch.Tensor,
        second: torch.Tensor,
        direction: Direction,
        first_label: str = "",
        second_label: str = "",
    ) -> io.NodeOutput:
        from ..exvideo_core.video.charts import stack_clips

        return io.NodeOutput(stack_clips(first, second, (first_label, second_label), direction))


def _as_image(image: Any) -> torch.Tensor:  # noqa: ANN401 - a Pillow image; Pillow is not imported at startup
    """A Pillow image as ComfyUI's IMAGE, [1, H, W, 3] in 0..1."""
    import numpy as np
    import torch

    return torch.from_numpy(np.asarray(image, np.float32) / 255)[None]
