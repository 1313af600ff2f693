"""Reading and writing files: safetensors headers, and output that is written whole or not at all."""
