"""The extension on diffusers' Stable Video Diffusion: the only package that imports `diffusers`."""
