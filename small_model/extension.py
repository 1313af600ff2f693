"""Post-tune the 128-frame extension of the small model in large batches.

    python -m small_model.extension --out FOLDER --base MODEL [--device cuda --seconds 270] [--steps N]

Uses the untrained extension, the trained parts and the loss of `exvideo_core.post_tuning`, but draws and encodes its
clips in memory. The run resumes from its last saved state.
"""

from __future__ import annotations

import argparse
import logging
import os
from dataclasses import replace
from pathlib import Path

import torch

from exvideo_core.diffusers import checkpoint, patch
from exvideo_core.method.extension import Extension
from exvideo_core.post_tuning.loss import loss_weight
from exvideo_core.post_tuning.selection import select, untrained

from .bank import Bank
from .hard import with_hard
from .held_out import HeldOut, curve, show
from .options import add_options, levels_of, prepare
from .training import Learner, Plan

FRAMES = 128
PARTS = ("positions", "convolution", "attention")
_log = logging.getLogger("small_model")


def without(extension: Extension, part: str, start: Extension) -> Extension:
    """An extension with one part as it is before post-tuning."""
    fields = {"positions": ("positions",), "convolution": ("conv_weight", "conv_bias"), "attention": ("shared",)}[part]
    pairs = zip(extension.blocks, start.blocks, strict=True)
    blocks = [replace(trained, **{name: getattr(reset, name) for name in fields}) for trained, reset in pairs]
    return replace(extension, blocks=tuple(blocks))


def train(options: argparse.Namespace) -> None:
    """Train from an untrained extension, from `--init`, or from the last saved state."""
    out: Path = options.out
    svd = checkpoint.load(options.base)
    unet = svd.unet
    start = untrained(unet, FRAMES)
    extension = Extension.load(options.init) if options.init else start
    patch.apply(unet, without(extension, options.without, start) if options.without else extension)
    for part in (unet, svd.vae, svd.image_encoder):
        part.to(options.device)
    groups = select(unet, **{part: part != options.without for part in PARTS})
    plan = Plan(
        frames=FRAMES, batch=options.batch, rate=options.rate, warmup=options.warmup, levels=levels_of(options),
        weight=loss_weight, steps=options.steps, seconds=options.seconds, ema=options.ema, seed=options.seed,
        muon=options.muon, recycle=options.recycle,
    )  # fmt: skip
    held = HeldOut.of(svd, options.watch_clips, FRAMES)
    seeds = range(options.first_clip, options.first_clip + options.clips)
    bank = Bank.encode(svd.vae, svd.image_encoder, seeds, options.clip_frames)
    _log.info("%d clips of %d frames encoded", *bank.latents.shape[:2])
    multiples = {"positions": options.positions_rate}
    dtype = torch.bfloat16 if options.bf16 else torch.float32
    learner = Learner(
        unet.train(), [(part, multiples.get(name, 1.0)) for name, part in groups.items()], plan, dtype, options.graph,
        options.compile,
    )  # fmt: skip
    if options.hard:
        bank = with_hard(bank, svd, learner.call, FRAMES, options.hard, options.hard // 8, options.seed)
    learner.resume(out / "extension-state.pt")

    def export() -> None:
        target = out / "extension.safetensors"
        patch.collect(unet, unet.state_dict() | learner.average()).save(f"{target}.part.safetensors")
        os.replace(f"{target}.part.safetensors", target)

    def watch(done: float) -> None:
        export()
        _log.info("held-out clips at %.0f %%:\n%s", 100 * done, show(curve(held, learner.call)))

    learner.train(bank, out / "extension-state.pt", watch=watch, watched=tuple(options.watch))
    export()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, batch=16, rate=1e-3)
    parser.add_argument("--base", type=Path, required=True, help="SVD model: a file or a diffusers folder")
    parser.add_argument(
        "--hard", type=int, default=0, metavar="N",
        help="draw half of the windows from the eighth of N random ones in which the model is most wrong at the start",
    )  # fmt: skip
    parser.add_argument("--init", type=Path, help="extension to start from (default: an untrained one)")
    parser.add_argument("--without", choices=PARTS, help="part to reset and not to train")
    parser.add_argument(
        "--positions-rate", type=float, default=10.0, help="factor on the learning rate for the position tables"
    )
    options = parser.parse_args()
    if 0 < options.hard < 8:
        parser.error("--hard needs at least 8 windows, an eighth of which is drawn from")
    prepare(options)
    train(options)


if __name__ == "__main__":
    main()
