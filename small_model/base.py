"""Trains the small 25-frame SVD that the extension is post-tuned on.

    python -m small_model.base --out FOLDER [--steps 2600]

FOLDER holds the first stage (`small_model.first_stage`); the latents of the training clips are cached there, and
the run resumes from its last checkpoint.
"""

from __future__ import annotations

import argparse
import logging
import os
import time
from pathlib import Path

import numpy as np
import torch

from exvideo_core.imaging import clip_pixels
from exvideo_core.post_tuning.loss import denoise, sigma_ramp

from . import world
from .first_stage import SCALING

FRAMES = 25
FPS = 30
NOISE_AUG = 0.02
UNET = {
    "sample_size": 16,
    "in_channels": 8,
    "out_channels": 4,
    "block_out_channels": (32, 64, 64, 64),
    "num_attention_heads": (1, 2, 2, 2),
    "cross_attention_dim": 64,
    "addition_time_embed_dim": 32,
    "projection_class_embeddings_input_dim": 96,
    "num_frames": FRAMES,
}
_log = logging.getLogger("small_model")


def encode_clips(folder: Path, clips: int, frames: int, first_seed: int = 0) -> dict[str, torch.Tensor]:
    """Latents, image embeddings and motion buckets of seeded clips, from the cache or made now.

    Returns:
        latents [clips, frames, 4, 16, 16] (scaled), embeddings [clips, 1, 64], buckets [clips].
    """
    from diffusers import AutoencoderKLTemporalDecoder
    from transformers import CLIPVisionModelWithProjection

    cache = folder / f"latents-{first_seed}-{clips}x{frames}.pt"
    if cache.exists():
        return torch.load(cache)
    vae = AutoencoderKLTemporalDecoder.from_pretrained(folder / "vae").eval()
    encoder = CLIPVisionModelWithProjection.from_pretrained(folder / "image_encoder").eval()
    latents, embeddings, buckets = [], [], []
    began = time.monotonic()
    with torch.no_grad():
        for seed in range(first_seed, first_seed + clips):
            clip = world.sample(seed)
            pictures = torch.from_numpy(world.render(clip, frames))
            with torch.autocast("cpu", torch.bfloat16):
                pixels = pictures.permute(0, 3, 1, 2) * 2 - 1
                encoded = torch.cat([vae.encode(part).latent_dist.mode() for part in pixels.split(32)])
            latents.append(encoded.float() * SCALING)
            embeddings.append(encoder(clip_pixels(pictures[:1])).image_embeds)
            buckets.append(clip.motion_bucket)
            if seed % 200 == 199:
                _log.info("encoded %d clips of %d (%.0f s)", seed - first_seed + 1, clips, time.monotonic() - began)
    found = {
        "latents": torch.stack(latents),
        "embeddings": torch.stack(embeddings),
        "buckets": torch.tensor(buckets),
    }
    torch.save(found, cache)
    return found


def train(folder: Path, steps: int, clips: int, batch: int, rate: float, every: int, seed: int = 0) -> None:
    from diffusers import UNetSpatioTemporalConditionModel

    torch.manual_seed(seed)
    data = encode_clips(folder, clips, FRAMES)
    unet = UNetSpatioTemporalConditionModel(**UNET)
    ema = {name: value.detach().clone() for name, value in unet.state_dict().items()}
    optimizer = torch.optim.AdamW(unet.parameters(), lr=rate, weight_decay=0.0, betas=(0.9, 0.99), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.04, div_factor=10)
    checkpoint = folder / "base-state.pt"
    start = 0
    if checkpoint.exists():
        state = torch.load(checkpoint)
        unet.load_state_dict(state["unet"])
        ema = state["ema"]
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        torch.set_rng_state(state["random"])
        start = state["step"]
        _log.info("resumed at step %d", start)
    ramp = sigma_ramp()
    began = time.monotonic()
    losses: list[float] = []
    for step in range(start, steps):
        chosen = torch.randint(clips, (batch,))
        latents = data["latents"][chosen]
        # One draw a clip, spread over the ramp: batches of few clips then see high and low noise alike.
        places = (torch.arange(batch) + torch.rand(batch)) / batch
        sigma = ramp[(places * len(ramp)).long()]
        noisy = latents + torch.randn_like(latents) * sigma.view(-1, 1, 1, 1, 1)
        first = (latents[:, 0] + NOISE_AUG * torch.randn_like(latents[:, 0])) / SCALING
        ids = torch.tensor([[FPS - 1, 0, NOISE_AUG]]).repeat(batch, 1)
        ids[:, 1] = data["buckets"][chosen]
        with torch.autocast("cpu", torch.bfloat16):
            clean = denoise(unet, noisy, sigma, first, data["embeddings"][chosen], ids)
        error = (clean - latents).square().mean((1, 2, 3, 4))
        loss = (error * (1 + sigma.square()) / sigma.square()).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        decay = min(0.998, (step + 1) / (step + 10))
        with torch.no_grad():
            live = unet.state_dict()
            torch._foreach_lerp_(list(ema.values()), [live[name] for name in ema], 1 - decay)
        losses.append(error[: batch // 2].mean().item())  # the noisier half: there, paths are decided
        if (step + 1) % 50 == 0:
            noisiest = np.mean(losses[-50:])
            _log.info(
                "base %d/%d error of the noisier half %.4f (%.0f s)", step + 1, steps, noisiest, time.monotonic() - began
            )
        if (step + 1) % every == 0 or step + 1 == steps:
            state = {
                "unet": unet.state_dict(), "ema": ema, "optimizer": optimizer.state_dict(),
                "schedule": schedule.state_dict(), "random": torch.get_rng_state(), "step": step + 1,
            }  # fmt: skip
            torch.save(state, f"{checkpoint}.part")
            os.replace(f"{checkpoint}.part", checkpoint)
    unet.load_state_dict(ema)
    unet.eval().save_pretrained(folder / "unet")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder with the first stage")
    parser.add_argument("--steps", type=int, default=2600)
    parser.add_argument("--clips", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rate", type=float, default=1.5e-3)
    parser.add_argument("--every", type=int, default=200, help="steps between checkpoints")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    train(options.out, options.steps, options.clips, options.batch, options.rate, options.every)


if __name__ == "__main__":
    main()
