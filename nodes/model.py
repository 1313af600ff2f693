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
            description="Applies an ExVideo extension to an SVD model, so that it can generate as many frames as the "
            "extension was trained for (128 for ExVideo-SVD-128f-v1).",
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="An SVD model with the same widths as the extension. You can apply LoRAs before "
                    "or after this node.",
                ),
                ExtensionSocket.Input("extension", tooltip="The extension, from Load ExVideo Extension."),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="Strength of the extension: 0 is the base model, 1 the extension as trained. Scales "
                    "weights, positions and convolution together.",
                ),
                io.Combo.Input(
                    "positions",
                    options=list(POSITION_MODES),
                    default="trained",
                    tooltip="How the trained frame positions are assigned to frames. trained: in order, up to the "
                    "trained length. stretch: all positions, resampled to the length of the video. repeat: in order, "
                    "then back and forth past the last one.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    display_name="model", tooltip="A patched copy of the model. The input model is not changed."
                )
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
            description="Manual control of the memory chunk size and of keeping skip connections in RAM, for models "
            "with an ExVideo extension. The result does not change. Without this node, the chunk size depends on the "
            "GPU's memory size.",
            inputs=[
                io.Model.Input("model", tooltip="The model from ExVideo Apply."),
                io.Int.Input(
                    "chunk_megabytes",
                    default=0,
                    min=0,
                    max=65536,
                    tooltip="Size of the largest tensor in a chunk. Lower values use less memory, but are slower on "
                    "a GPU. 0 chooses the size by GPU memory: 128 up to 10 GB, 256 up to 20 GB, 512 above; 32 on a "
                    "CPU.",
                ),
                io.Boolean.Input(
                    "offload_skips",
                    default=False,
                    tooltip="Keep the UNet's skip connections in RAM between its two halves, copying them while it "
                    "computes. Saves 40% of the memory or more.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    display_name="model",
                    tooltip="A copy of the model with these settings. The input model is not changed.",
                )
            ],
        )

    @classmethod
    @checked
    def execute(cls, model: ModelPatcher, chunk_megabytes: int, offload_skips: bool) -> io.NodeOutput:
        from ..exvideo_core.comfyui.low_memory.chunked_unet import with_memory_settings
        from ..exvideo_core.comfyui.low_memory.estimate import MemorySettings

        return io.NodeOutput(with_memory_settings(model, MemorySettings(chunk_megabytes, offload_skips)))
