"""Nodes that patch a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from comfy_api.v0_0_2 import io

from ..exvideo_core.choices import POSITION_MODES, PositionMode
from .checks import checked
from .types import ExtensionSocket

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

    from ..exvideo_core.method.extension import Extension


class ExVideoApply(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ExVideoApply",
            display_name="ExVideo Apply",
            category="ExVideo",
            description="Applies an ExVideo extension to an SVD model, so that it makes clips as long as the "
            "extension was trained for (128 frames for ExVideo-SVD-128f-v1).",
            inputs=[
                io.Model.Input(
                    "model", tooltip="An SVD model of the extension's widths; LoRAs may come before or after."
                ),
                ExtensionSocket.Input("extension", tooltip="The extension, from Load ExVideo Extension."),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="0 is the model without the extension, 1 the extension as trained. Weights, positions and "
                    "convolution move together.",
                ),
                io.Combo.Input(
                    "positions",
                    options=list(POSITION_MODES),
                    default="trained",
                    tooltip="How the trained frame positions serve the clip. trained: its first frames, up to the "
                    "trained length. stretch: all of them, resampled to the clip. repeat: past the last, back and "
                    "forth.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="A patched clone; the input model stays as it was.")
            ],
        )

    @classmethod
    @checked
    def execute(
        cls, model: ModelPatcher, extension: Extension, strength: float, positions: PositionMode
    ) -> io.NodeOutput:
        from ..exvideo_core.comfyui.apply.patch import apply_extension

        return io.NodeOutput(apply_extension(model, extension, strength, positions))


class ExVideoMemory(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ExVideoMemory",
            display_name="ExVideo Memory",
            category="ExVideo/advanced",
            description="Sets by hand how a model with an extension is computed in chunks. The result stays the same; "
            "without this node the chunks follow the size of the card.",
            inputs=[
                io.Model.Input("model", tooltip="The model from ExVideo Apply."),
                io.Int.Input(
                    "chunk_megabytes",
                    default=0,
                    min=0,
                    max=65536,
                    tooltip="Size of a chunk's largest tensor. Smaller needs less memory and is slower on a GPU. 0 "
                    "follows the size of the card: 128 up to 10 GB, 256 up to 20 GB, 512 above; 32 on a CPU.",
                ),
                io.Boolean.Input(
                    "offload_skips",
                    default=False,
                    tooltip="Keep the UNet's skip tensors in RAM between its two halves, copied while it computes. "
                    "Saves 40 % of the memory or more.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="A clone with these settings; the input stays as it was.")
            ],
        )

    @classmethod
    @checked
    def execute(cls, model: ModelPatcher, chunk_megabytes: int, offload_skips: bool) -> io.NodeOutput:
        from ..exvideo_core.comfyui.low_memory.chunked_unet import with_memory_settings
        from ..exvideo_core.comfyui.low_memory.estimate import MemorySettings

        return io.NodeOutput(with_memory_settings(model, MemorySettings(chunk_megabytes, offload_skips)))
