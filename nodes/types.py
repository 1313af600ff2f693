"""Socket types of this pack."""

from __future__ import annotations

from comfy_api.v0_0_2 import io

MAX_FRAMES = 16384
RecordingSocket = io.Custom("EXVIDEO_RECORDING")
ExtensionSocket = io.Custom("EXVIDEO_EXTENSION")
