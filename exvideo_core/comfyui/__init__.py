"""ComfyUI: the only package here that touches `comfy`'s models."""
