"""The nodes: each validates, clones and calls one function of `exvideo_core`."""

from __future__ import annotations

from comfy_api.v0_0_2 import ComfyExtension, io

from .conditioning import ExVideoConditioning
from .example import ExVideoExamplePicture
from .keyframes import ExVideoKeyframes
from .latents import ExVideoDecode, ExVideoNormalizeLatent
from .loaders import ExVideoCheckpointLoader, ExVideoLoader
from .lora import ExVideoCogVideoXLoader, ExVideoLoraLoader
from .model import ExVideoApply, ExVideoMemory
from .pictures import ExVideoCompare, ExVideoContactSheet, ExVideoPlot, ExVideoRecord
from .post_tuning import ExVideoInit, ExVideoSave
from .video import ExVideoSaveVideo
from .windows import ExVideoTiles, ExVideoWindows

NODES: list[type[io.ComfyNode]] = [
    ExVideoCheckpointLoader,
    ExVideoLoader,
    ExVideoApply,
    ExVideoConditioning,
    ExVideoNormalizeLatent,
    ExVideoDecode,
    ExVideoSaveVideo,
    ExVideoWindows,
    ExVideoKeyframes,
    ExVideoMemory,
    ExVideoTiles,
    ExVideoInit,
    ExVideoSave,
    ExVideoPlot,
    ExVideoRecord,
    ExVideoContactSheet,
    ExVideoCompare,
    ExVideoExamplePicture,
    ExVideoLoraLoader,
    ExVideoCogVideoXLoader,
]


class ExVideoExtension(ComfyExtension):
    """The node pack."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES
