"""Train the small 25-frame SVD base model.

    python -m small_model.base --out FOLDER [--first-stage FOLDER] [--device cuda --seconds 270] [--steps N]

Needs the VAE and the image encoder of `small_model.first_stage`, and writes the whole model to `base.safetensors`. The
run resumes from its last saved state.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

import torch

from exvideo_core.diffusers import checkpoint

from . import world
from .bank import Bank
from .held_out import HeldOut, curve, show
from .options import add_options, levels_of, prepare
from .training import Learner, Plan

FRAMES = 25
NOISE_AUGMENTATIONS = (0.0, 0.02)  # what post-tuning and sampling tell the model
WIDTHS = (64, 64, 32, 32)
HEAD = 32  # channels of an attention head
UNET: dict[str, Any] = {
    "sample_size": world.SIZE // 8,
    "in_channels": 8,
    "out_channels": 4,
    "block_out_channels": WIDTHS,
    "num_attention_heads": tuple(width // HEAD for width in WIDTHS),
    "cross_attention_dim": 64,
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 768,
    "num_frames": FRAMES,
}
_log = logging.getLogger("small_model")


def weight(sigma: torch.Tensor) -> torch.Tensor:
    """Weight of the squared error that makes velocity errors count equally at all noise levels."""
    return (1 + sigma.square()) / sigma.square()


def train(options: argparse.Namespace) -> None:
    """Train from random weights, from `--init`, or from the last saved state."""
    from diffusers import AutoencoderKLTemporalDecoder, UNetSpatioTemporalConditionModel
    from transformers import CLIPVisionModelWithProjection

    out: Path = options.out
    first_stage: Path = options.first_stage or out
    vae = AutoencoderKLTemporalDecoder.from_pretrained(first_stage / "vae").eval().to(options.device)
    encoder = CLIPVisionModelWithProjection.from_pretrained(first_stage / "image_encoder").eval().to(options.device)
    unet = checkpoint.load(options.init).unet if options.init else UNetSpatioTemporalConditionModel(**UNET)
    unet = unet.to(options.device).train()
    plan = Plan(
        frames=FRAMES, batch=options.batch, rate=options.rate, warmup=options.warmup, levels=levels_of(options),
        weight=weight, augmentations=NOISE_AUGMENTATIONS, steps=options.steps, seconds=options.seconds,
        ema=options.ema, seed=options.seed, muon=options.muon, skips=tuple(options.skips),
    )  # fmt: skip
    held = HeldOut.of(checkpoint.SVD(unet, vae, encoder), options.watch_clips, FRAMES)
    bank = Bank.encode(vae, encoder, range(options.clips), options.clip_frames)
    _log.info("%d clips of %d frames encoded", *bank.latents.shape[:2])
    dtype = torch.bfloat16 if options.bf16 else torch.float32
    learner = Learner(unet, [(list(unet.parameters()), 1.0)], plan, dtype, options.graph, options.compile)
    learner.resume(out / "base-state.pt")

    def watch(done: float) -> None:
        _log.info("held-out clips at %.0f %%:\n%s", 100 * done, show(curve(held, learner.call)))

    learner.train(bank, out / "base-state.pt", watch=watch, watched=tuple(options.watch))
    unet = unet.float().cpu()
    unet.load_state_dict(learner.average(), strict=True)
    checkpoint.save(checkpoint.SVD(unet.eval(), vae.cpu(), encoder.cpu()), out / "base.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, batch=48, rate=1.5e-3)
    parser.add_argument("--skips", type=int, nargs="+", default=[1], help="distances of frames to draw from")
    parser.add_argument("--first-stage", type=Path, help="folder of VAE and image encoder (default: --out)")
    parser.add_argument("--init", type=Path, help="SVD model to start from (default: random weights)")
    options = parser.parse_args()
    prepare(options)
    train(options)


if __name__ == "__main__":
    main()
