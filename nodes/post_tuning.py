"""Nodes that create and save extensions."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import folder_paths
from comfy_api.v0_0_2 import io

from .checks import checked
from .types import MAX_FRAMES, ExtensionSocket

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

    from ..exvideo_core.method.extension import Extension


class ExVideoInit(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ExVideoInit",
            display_name="Create ExVideo Extension",
            category="ExVideo/post-tuning",
            description="Creates an untrained extension for an SVD model, as the starting point for post-tuning. It "
            "consists of the model's own temporal weights, sinusoidal positions and an identity convolution. It does "
            "not improve longer videos until it is trained.",
            inputs=[
                io.Model.Input("model", tooltip="The SVD model to extend, straight from its checkpoint."),
                io.Int.Input(
                    "frames",
                    default=128,
                    min=1,
                    max=MAX_FRAMES,
                    tooltip="Number of frames that the extension will be trained for.",
                ),
            ],
            outputs=[
                ExtensionSocket.Output(
                    display_name="extension", tooltip="The extension, for Save ExVideo Extension or ExVideo Apply."
                )
            ],
        )

    @classmethod
    @checked
    def execute(cls, model: ModelPatcher, frames: int) -> io.NodeOutput:
        from ..exvideo_core.comfyui.apply.create import untrained_extension

        return io.NodeOutput(untrained_extension(model, frames))


class ExVideoSave(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ExVideoSave",
            display_name="Save ExVideo Extension",
            category="ExVideo/post-tuning",
            description="Saves an extension to the output folder, in the format of the published one.",
            inputs=[
                ExtensionSocket.Input("extension", tooltip="The extension to save."),
                io.String.Input(
                    "filename_prefix",
                    default="exvideo/ExVideo",
                    tooltip="Subfolder and file name prefix, within the output folder. A number is appended.",
                ),
                io.Combo.Input(
                    "dtype",
                    options=["fp16", "bf16", "fp32"],
                    default="fp16",
                    tooltip="Data type of the saved weights. The published extension uses fp16.",
                ),
            ],
            outputs=[io.String.Output(display_name="path", tooltip="Path of the saved file.")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, extension: Extension, filename_prefix: str, dtype: str) -> io.NodeOutput:
        import torch

        from ..exvideo_core.files.output_file import explain_errors

        types = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
        root = folder_paths.get_output_directory()
        with explain_errors(os.path.join(root, filename_prefix)):
            folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(filename_prefix, root)
        file = f"{name}_{counter:05}_.safetensors"
        path = os.path.join(folder, file)
        extension.save(path, types[dtype])
        saved = {"filename": file, "subfolder": subfolder, "type": "output"}
        return io.NodeOutput(path, ui={"extensions": [saved]})
