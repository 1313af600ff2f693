"""The UNet's and VAE's layers with bounded memory, and their memory estimate for ComfyUI."""
