"""Socket types of this pack."""

from __future__ import annotations

from comfy_api.latest import io

MAX_FRAMES = 16384
ExtensionSocket = io.Custom("EXVIDEO_EXTENSION")
