"""Safetensors headers, and output files that are written atomically."""
