"""Puts the trained parts together as one SVD checkpoint.

python -m small_model.export --model FOLDER --to small_model/checkpoints/exvideo_small.safetensors
"""

from __future__ import annotations

import argparse
from pathlib import Path

from exvideo_core.diffusers import checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="diffusers folder: unet, vae, image_encoder")
    parser.add_argument("--to", type=Path, required=True, help="the file to write, in fp16")
    options = parser.parse_args()
    options.to.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.save(checkpoint.load(options.model), options.to)


if __name__ == "__main__":
    main()
