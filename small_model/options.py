"""Command-line options of the training runs of the small UNets."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import get_args

import torch

from exvideo_core.choices import NoiseKind
from exvideo_core.post_tuning.noise import noise_levels


def add_options(parser: argparse.ArgumentParser, batch: int, rate: float) -> None:
    """Add the command-line options of a training run."""
    parser.add_argument("--out", type=Path, required=True, help="folder of the run and its inputs")
    parser.add_argument("--steps", type=int, default=0, help="steps to train (0: unlimited)")
    parser.add_argument("--seconds", type=float, default=0.0, help="time to train (0: unlimited)")
    parser.add_argument("--batch", type=int, default=batch, help="clips per step")
    parser.add_argument("--rate", type=float, default=rate, help="maximum learning rate")
    parser.add_argument("--warmup", type=int, default=200, help="warm-up steps")
    parser.add_argument("--muon", action="store_true", help="update matrices and convolutions with Muon")
    parser.add_argument("--recycle", type=float, default=0.0, help="share of clips whose first frame gets an error")
    parser.add_argument("--compile", action="store_true", help="compile the UNet (torch.compile)")
    parser.add_argument("--ema", type=float, default=0.998, help="decay of the moving average per step")
    parser.add_argument("--clips", type=int, default=3072, help="number of training clips")
    parser.add_argument("--first-clip", type=int, default=0, help="seed of the first training clip")
    parser.add_argument("--clip-frames", type=int, default=256, help="frames per training clip")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16 with float32 master weights")
    parser.add_argument("--graph", action="store_true", help="capture forward and backward pass as a CUDA graph")
    parser.add_argument(
        "--noise", choices=get_args(NoiseKind), default="lognormal", help="distribution of noise levels"
    )
    parser.add_argument("--noise-low", type=float, default=0.3, help="lowest noise level of the interval")
    parser.add_argument("--noise-high", type=float, default=20.0, help="highest noise level of the interval")
    parser.add_argument("--noise-mean", type=float, default=1.0, help="mean of the logarithm (log-normal)")
    parser.add_argument("--noise-deviation", type=float, default=1.6, help="standard deviation of the logarithm")
    parser.add_argument("--noise-share", type=float, default=0.5, help="of levels drawn so; the rest are the ramp's")
    parser.add_argument("--watch", type=float, nargs="*", default=[], help="shares of the run at which to evaluate")
    parser.add_argument("--watch-clips", type=int, default=16, help="held-out clips to evaluate")


def levels_of(options: argparse.Namespace) -> torch.Tensor:
    """Noise levels of the options of `add_options`."""
    return noise_levels(
        options.noise, low=options.noise_low, high=options.noise_high, mean=options.noise_mean,
        deviation=options.noise_deviation, share=options.noise_share,
    )  # fmt: skip


def prepare(options: argparse.Namespace) -> None:
    """Set up logging, seeds and GPU arithmetic."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(options.seed)
