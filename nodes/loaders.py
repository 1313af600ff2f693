"""Nodes that load model files."""

from __future__ import annotations

import folder_paths
from comfy_api.v0_0_2 import io, ui

from .folders import KEY, checkpoint_names, checkpoint_path, find_checkpoint, fingerprint
from .types import ExtensionSocket


class ExVideoCheckpointLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ExVideoCheckpointLoader",
            display_name="Load SVD Checkpoint (ExVideo)",
            category="ExVideo/loaders",
            description="Loads a Stable Video Diffusion checkpoint of any width. For svd_xt, the result is the same "
            "as with Load Checkpoint Image Only.",
            inputs=[
                io.Combo.Input(
                    "ckpt_name",
                    options=checkpoint_names(),
                    tooltip="An SVD checkpoint (.safetensors) in models/checkpoints, such as svd_xt.safetensors. "
                    "exvideo_small.safetensors, included with this pack, is a small model of moving shapes.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The SVD diffusion model."),
                io.ClipVision.Output(display_name="clip_vision", tooltip="The image encoder in the checkpoint."),
                io.Vae.Output(display_name="vae", tooltip="The VAE, with SVD's temporal decoder."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, ckpt_name: str | None = None) -> tuple[int, int] | None:
        return fingerprint(None if ckpt_name is None else find_checkpoint(ckpt_name))

    @classmethod
    def execute(cls, ckpt_name: str) -> io.NodeOutput:
        from ..exvideo_core.comfyui.checkpoint.load import load_checkpoint

        return io.NodeOutput(*load_checkpoint(checkpoint_path(ckpt_name)))


class ExVideoLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ExVideoLoader",
            display_name="Load ExVideo Extension",
            category="ExVideo/loaders",
            description="Loads and validates an ExVideo extension, such as ExVideo-SVD-128f-v1.",
            inputs=[
                io.Combo.Input(
                    "extension_name",
                    options=folder_paths.get_filename_list(KEY),
                    tooltip="An ExVideo extension (.safetensors) in models/exvideo. exvideo_small_128f.safetensors, "
                    "included with this pack, is for exvideo_small.",
                ),
            ],
            outputs=[
                ExtensionSocket.Output(display_name="extension", tooltip="The extension, for ExVideo Apply."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, extension_name: str | None = None) -> tuple[int, int] | None:
        return fingerprint(None if extension_name is None else folder_paths.get_full_path(KEY, extension_name))

    @classmethod
    def execute(cls, extension_name: str) -> io.NodeOutput:
        from ..exvideo_core.method.extension import Extension

        extension = Extension.load(folder_paths.get_full_path_or_raise(KEY, extension_name))
        if extension.few_steps is None:
            return io.NodeOutput(extension)
        return io.NodeOutput(extension, ui=ui.PreviewText(f"Distilled for {extension.few_steps}"))
