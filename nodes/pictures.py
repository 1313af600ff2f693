"""Nodes for looking: at an extension, at a denoising, at two clips."""

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
            description="Draws an extension: the frame positions it has learned, how alike its frames are to each "
            "other, and how far each of its blocks has moved from where post-tuning began.",
            inputs=[
                ExtensionSocket.Input("extension", tooltip="The extension to look at."),
                io.Int.Input(
                    "block",
                    default=1,
                    min=1,
                    max=16,
                    tooltip="The block whose positions are drawn: 1 to 6 on the way down, 7 in the middle, 8 to 16 on "
                    "the way up.",
                ),
                io.Model.Input(
                    "base",
                    optional=True,
                    tooltip="The SVD model that the extension extends, from its checkpoint. With it, the distance of "
                    "the tuned weights is drawn too.",
                ),
            ],
            outputs=[io.Image.Output(display_name="image", tooltip="The picture, which the node shows too.")],
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
            description="Keeps what a sampler takes the finished clip to be at some of its steps, for ExVideo Contact "
            "Sheet. The result of sampling stays the same.",
            inputs=[
                io.Model.Input("model", tooltip="The model for the sampler: the last of the nodes that change it."),
                io.Int.Input(
                    "steps",
                    default=4,
                    min=1,
                    max=64,
                    tooltip="How many steps to keep, evenly, the last one among them.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="A clone that records; the input stays as it was."),
                RecordingSocket.Output(
                    display_name="recording",
                    tooltip="For ExVideo Contact Sheet: the sampler's runs with this model.",
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
            description="Lays frames of a clip out on one picture; with a recording, a row for each recorded step of "
            "its denoising above them.",
            inputs=[
                io.Vae.Input("vae", tooltip="The VAE of the SVD checkpoint."),
                io.Latent.Input("latent", tooltip="The clip, from the sampler."),
                io.Int.Input(
                    "frames",
                    default=8,
                    min=1,
                    max=64,
                    tooltip="Frames in a row, evenly from the clip's first to its last.",
                ),
                io.Int.Input(
                    "edge", default=128, min=16, max=1024, tooltip="Longest side of a frame on the sheet, in pixels."
                ),
                RecordingSocket.Input(
                    "recording",
                    optional=True,
                    tooltip="From ExVideo Record Denoising, whose model made this clip.",
                ),
            ],
            outputs=[io.Image.Output(display_name="image", tooltip="The sheet, which the node shows too.")],
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
            description="Puts two clips into one, frame by frame: the base beside the extension, two strengths, two "
            "ways of going past the trained length. The shorter one stands still at its end.",
            inputs=[
                io.Image.Input("first", tooltip="A clip."),
                io.Image.Input("second", tooltip="Another, of any length; it is scaled to fit the first."),
                io.Combo.Input(
                    "direction", options=list(DIRECTIONS), default=DIRECTIONS[0], tooltip="Where the second is put."
                ),
                io.String.Input(
                    "first_label", default="", optional=True, tooltip="Written above the first; empty for none."
                ),
                io.String.Input(
                    "second_label", default="", optional=True, tooltip="Written above the second; empty for none."
                ),
            ],
            outputs=[io.Image.Output(display_name="image", tooltip="The frames of both, for Create Video.")],
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


def _as_image(picture: Any) -> torch.Tensor:  # noqa: ANN401 - Pillow's, which is not imported at start-up
    """A picture as ComfyUI's IMAGE, [1, H, W, 3] in 0..1."""
    import numpy as np
    import torch

    return torch.from_numpy(np.asarray(picture, np.float32) / 255)[None]
