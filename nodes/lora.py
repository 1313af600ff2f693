"""Nodes for ExVideo's LoRAs of other models than SVD."""

from __future__ import annotations

from typing import TYPE_CHECKING

import folder_paths
from comfy_api.v0_0_2 import io

from .checks import checked
from .folders import fingerprint

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher


class ExVideoLoraLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ExVideoLoraLoader",
            display_name="Load ExVideo LoRA",
            category="ExVideo/loaders",
            description="Applies an ExVideo LoRA to CogVideoX-5B (ExVideo-CogVideoX-LoRA-129f-v1, 129 frames) or "
            "Wan 2.1 T2V 1.3B (Wan2.1-1.3b-lora-exvideo-v1). Load LoRA does not know the names in these files and "
            "skips them.",
            inputs=[
                io.Model.Input("model", tooltip="CogVideoX-5B or Wan 2.1 T2V 1.3B, as the LoRA requires."),
                io.Combo.Input(
                    "lora_name",
                    options=folder_paths.get_filename_list("loras"),
                    tooltip="An ExVideo LoRA (.safetensors) in models/loras.",
                ),
                io.Float.Input(
                    "strength_model",
                    default=1.0,
                    min=-100.0,
                    max=100.0,
                    step=0.01,
                    tooltip="Strength of the LoRA: 0 is the base model, 1 the LoRA as trained.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    display_name="model",
                    tooltip="A patched copy of the model. A CogVideoX model also gets the frame positions that it "
                    "was trained with, whatever the strength. The input model is not changed.",
                )
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, lora_name: str | None = None, **_: object) -> tuple[int, int] | None:
        return fingerprint(None if lora_name is None else folder_paths.get_full_path("loras", lora_name))

    @classmethod
    @checked
    def execute(cls, model: ModelPatcher, lora_name: str, strength_model: float) -> io.NodeOutput:
        from ..exvideo_core.comfyui.lora import apply_lora
        from ..exvideo_core.method import lora

        file = lora.read(folder_paths.get_full_path_or_raise("loras", lora_name))
        return io.NodeOutput(apply_lora(model, file, strength_model))


class ExVideoCogVideoXLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ExVideoCogVideoXLoader",
            display_name="Load CogVideoX (ExVideo)",
            category="ExVideo/loaders",
            description="Loads a CogVideoX transformer as its authors publish it, in one or more files. Load "
            "Diffusion Model does not know the names in these files.",
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=folder_paths.get_filename_list("diffusion_models"),
                    tooltip="A file (.safetensors) in models/diffusion_models. Of several files "
                    "(...-00001-of-00002.safetensors), choose any; all have to be in the same folder.",
                ),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The CogVideoX diffusion model.")],
        )

    @classmethod
    def fingerprint_inputs(cls, model_name: str | None = None) -> tuple[int, int] | None:
        return fingerprint(None if model_name is None else folder_paths.get_full_path("diffusion_models", model_name))

    @classmethod
    def execute(cls, model_name: str) -> io.NodeOutput:
        from ..exvideo_core.comfyui.cogvideox import load_diffusers_transformer

        path = folder_paths.get_full_path_or_raise("diffusion_models", model_name)
        return io.NodeOutput(load_diffusers_transformer(path))
