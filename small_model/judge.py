"""Evaluate a small SVD on held-out clips: denoising errors by noise level, and generated videos.

python -m small_model.judge --base MODEL [--extension FILE] [--frames 128] [--steps 1 25] [--videos FILE.npz]
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from pathlib import Path

import numpy as np

from exvideo_core.diffusers import checkpoint, patch
from exvideo_core.method.extension import Extension

from .held_out import HeldOut, curve, show
from .measure import binomial_interval

_log = logging.getLogger("small_model")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, help="SVD model: a file or a diffusers folder")
    parser.add_argument("--extension", type=Path, help="extension to apply")
    parser.add_argument("--frames", type=int, default=25)
    parser.add_argument(
        "--steps", type=int, nargs="*", default=[1, 25], help="numbers of denoising steps, one row each"
    )
    parser.add_argument("--clips", type=int, default=16)
    parser.add_argument("--curve-clips", type=int, default=16, help="clips of the denoising errors (0: skip them)")
    parser.add_argument("--decoded", type=int, default=4, help="clips of the denoising errors to decode and measure")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--videos", type=Path, help="output file for the videos of the last row")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    svd = checkpoint.load(options.base)
    if options.extension:
        patch.apply(svd.unet, Extension.load(options.extension))
    for part in (svd.unet, svd.vae, svd.image_encoder):
        part.eval().to(options.device)
    if options.curve_clips:
        held = HeldOut.of(svd, options.curve_clips, options.frames)
        _log.info("denoising curve at %d frames:\n%s", options.frames, show(curve(held, svd.unet, options.decoded)))
    held = HeldOut.of(svd, options.clips, options.frames)
    for steps in options.steps:
        began = time.monotonic()
        videos = held.decode(held.make(svd.unet, steps))
        figures = held.figures(videos)
        shapes = 2 * len(videos)
        figures["right_low"], figures["right_high"] = binomial_interval(round(figures["right"] * shapes), shapes)
        _log.info("%d frames in %d steps (%.0f s): %s", options.frames, steps, time.monotonic() - began,
                  json.dumps({name: round(value, 4) for name, value in figures.items()}))  # fmt: skip
        if options.videos and steps == options.steps[-1]:
            np.savez_compressed(options.videos, videos=(np.stack(videos) * 255).round().astype(np.uint8))


if __name__ == "__main__":
    main()
