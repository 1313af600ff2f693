"""The UNet's and VAE's layers with bounded memory, and what ComfyUI is told of it."""
