"""The ExVideo method, importable without ComfyUI (Duan et al., arXiv 2406.14130)."""
