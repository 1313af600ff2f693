"""Socket types of this pack."""

from __future__ import annotations

from comfy_api.latest import io

ExtensionSocket = io.Custom("EXVIDEO_EXTENSION")
