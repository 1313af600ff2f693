"""ExVideo for ComfyUI: registers the nodes, the model folder and the help pages."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from comfy_api.v0_0_2 import ComfyExtension

WEB_DIRECTORY = "./web"

__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]


async def comfy_entrypoint() -> ComfyExtension:
    """Called by ComfyUI once, at start-up."""
    from .nodes import ExVideoExtension
    from .nodes.folders import register_model_folder

    register_model_folder()
    return ExVideoExtension()
