"""Nodes that patch a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from comfy_api.latest import io

from ..exvideo_core.position_modes import POSITION_MODES, PositionMode
from .types import ExtensionSocket

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

    from ..exvideo_core.extension import Extension


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
    def execute(
        cls, model: ModelPatcher, extension: Extension, strength: float, positions: PositionMode
    ) -> io.NodeOutput:
        from ..exvideo_core.hosts.comfyui.patch import apply_extension

        return io.NodeOutput(apply_extension(model, extension, strength, positions))
