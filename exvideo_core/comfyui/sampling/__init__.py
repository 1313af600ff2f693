"""Wrappers around ComfyUI's sampling: windows, tiles, preview, recording."""
