"""Trains the small 25-frame SVD that the extension is post-tuned on.

    ACCELERATE_USE_CPU=true OMP_NUM_THREADS=1 torchrun --nproc_per_node 2 -m small_model.base --out FOLDER

FOLDER holds the first stage (`small_model.first_stage`); the latents of the training clips are cached there. One
process a core trains faster than one process on two. The run resumes from its last checkpoint.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from exvideo_core.post_tuning.loss import denoise, sigma_ramp
from exvideo_core.post_tuning.samples import Encoder

from . import world
from .first_stage import SCALING

FRAMES = 25
FPS = 30
NOISE_AUGMENTATIONS = (0.0, 0.02)  # what post-tuning and sampling tell the model
UNET: dict[str, Any] = {
    "sample_size": world.SIZE // 8,
    "in_channels": 8,
    "out_channels": 4,
    "block_out_channels": (32, 64, 64, 32),
    "num_attention_heads": (1, 2, 2, 1),
    "cross_attention_dim": 64,
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 768,
    "num_frames": FRAMES,
}
_WARMUP = 80  # steps over which the learning rate rises
_log = logging.getLogger("small_model")


def encode_clips(folder: Path, seeds: range, frames: int = FRAMES) -> dict[str, torch.Tensor]:
    """What the UNet reads of seeded clips.

    Returns:
        latents [N, frames, 4, 8, 8] (scaled), embeddings [N, 1, 64], buckets [N].
    """
    from diffusers import AutoencoderKLTemporalDecoder
    from transformers import CLIPVisionModelWithProjection

    encoder = Encoder(
        AutoencoderKLTemporalDecoder.from_pretrained(folder / "vae").eval(),
        CLIPVisionModelWithProjection.from_pretrained(folder / "image_encoder").eval(),
    )
    latents, embeddings, buckets = [], [], []
    for seed in seeds:
        clip = world.sample(seed)
        pictures = world.as_bytes(world.render(clip, frames))
        latents.append(encoder.latents(pictures))
        embeddings.append(encoder.embeddings(pictures[:1]))
        buckets.append(clip.motion_bucket)
        if len(buckets) % 200 == 0:
            _log.info("encoded %d clips of %d", len(buckets), len(seeds))
    return {"latents": torch.stack(latents), "embeddings": torch.stack(embeddings), "buckets": torch.tensor(buckets)}


def _training_clips(accelerator: Accelerator, folder: Path, clips: int) -> dict[str, torch.Tensor]:
    """Every process encodes its share; then all read all of them."""
    processes = accelerator.num_processes
    bounds = np.linspace(0, clips, processes + 1).astype(int)
    files = [folder / f"latents-{bounds[i]}-{bounds[i + 1]}.pt" for i in range(processes)]
    mine = files[accelerator.process_index]
    if not mine.exists():
        index = accelerator.process_index
        torch.save(encode_clips(folder, range(bounds[index], bounds[index + 1])), mine)
    accelerator.wait_for_everyone()
    parts = [torch.load(file) for file in files]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def train(folder: Path, steps: int, clips: int, batch: int, rate: float, every: int, seed: int = 0) -> None:
    """Train from random weights; `batch` clips per step and process."""
    from diffusers import UNetSpatioTemporalConditionModel

    accelerator = Accelerator()
    if not accelerator.is_main_process:
        _log.setLevel(logging.WARNING)
    data = _training_clips(accelerator, folder, clips)
    torch.manual_seed(seed)
    unet = UNetSpatioTemporalConditionModel(**UNET)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=rate, weight_decay=0.0, betas=(0.9, 0.99), fused=True)
    ema = {name: value.detach().clone() for name, value in unet.state_dict().items()}
    checkpoint = folder / "base-state.pt"
    start = 0
    if checkpoint.exists():
        state = torch.load(checkpoint)
        unet.load_state_dict(state["unet"])
        ema = state["ema"]
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
        _log.info("resumed at step %d", start)
    model = accelerator.prepare(unet)
    ramp = sigma_ramp()
    began = time.monotonic()
    recent: list[torch.Tensor] = []
    processes, rank = accelerator.num_processes, accelerator.process_index
    for step in range(start, steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min((step + 1) / _WARMUP, 0.5 * (1 + math.cos(math.pi * step / steps)))
        # All randomness comes from the step's and the process's number, so a resumed run needs no generator's state.
        generator = torch.Generator().manual_seed((seed * 1_000_000 + step) * 64 + rank)
        chosen = torch.randint(clips, (batch,), generator=generator)
        latents = data["latents"][chosen]
        # One draw a clip, spread over the ramp: batches of few clips then see high and low noise alike.
        places = (torch.arange(batch) * processes + rank + torch.rand(batch, generator=generator)) / batch / processes
        sigma = ramp[(places * len(ramp)).long()]
        noisy = latents + torch.randn(latents.shape, generator=generator) * sigma.view(-1, 1, 1, 1, 1)
        augmented = torch.tensor(NOISE_AUGMENTATIONS)[torch.randint(2, (batch,), generator=generator)]
        noise = torch.randn(latents[:, 0].shape, generator=generator) * augmented.view(-1, 1, 1, 1)
        ids = torch.stack([torch.full((batch,), FPS - 1.0), data["buckets"][chosen].float(), augmented], dim=1)
        clean = denoise(model, noisy, sigma, (latents[:, 0] + noise) / SCALING, data["embeddings"][chosen], ids)
        error = (clean - latents).square().mean((1, 2, 3, 4))
        loss = (error * (1 + sigma.square()) / sigma.square()).mean()
        optimizer.zero_grad()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        decay = min(0.998, (step + 1) / (step + 10))
        with torch.no_grad():
            live = unet.state_dict()
            torch._foreach_lerp_(list(ema.values()), [live[name] for name in ema], 1 - decay)
        recent.append(error.detach()[: batch // 2].mean())  # the noisier half: there, paths are decided
        if (step + 1) % 50 == 0:
            noisiest = accelerator.reduce(torch.stack(recent).mean(), "mean").item()
            recent.clear()
            elapsed = time.monotonic() - began
            _log.info("base %d/%d error of the noisier half %.4f (%.0f s)", step + 1, steps, noisiest, elapsed)
        if accelerator.is_main_process and ((step + 1) % every == 0 or step + 1 == steps):
            state = {
                "unet": unet.state_dict(), "ema": ema, "optimizer": optimizer.state_dict(),
                "step": step + 1,
            }  # fmt: skip
            torch.save(state, f"{checkpoint}.part")
            os.replace(f"{checkpoint}.part", checkpoint)
    if accelerator.is_main_process:
        unet.load_state_dict(ema)
        unet.eval().save_pretrained(folder / "unet")
    accelerator.end_training()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder with the first stage")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--clips", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=2, help="clips per step and process")
    parser.add_argument("--rate", type=float, default=1.5e-3)
    parser.add_argument("--every", type=int, default=100, help="steps between checkpoints")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    train(options.out, options.steps, options.clips, options.batch, options.rate, options.every)


if __name__ == "__main__":
    main()
