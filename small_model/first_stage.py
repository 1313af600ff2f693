"""Trains what surrounds the small UNet: the temporal VAE and the image encoder.

    python -m small_model.first_stage --out FOLDER [--vae-steps 500] [--encoder-steps 3500]

Both are the real architectures (diffusers' `AutoencoderKLTemporalDecoder`, CLIP's vision tower), small, and are
saved as diffusers and transformers folders. The encoder learns to tell where each lane's shape is, how it will set
out, and its colour: the part that CLIP's general knowledge of pictures plays in SVD.
"""

from __future__ import annotations

import argparse
import logging
import math
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from exvideo_core.video.images import clip_vision_pixels

from . import world

SCALING = 0.18215  # of SVD's latents
VAE = {
    "block_out_channels": (32, 32, 64, 64),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "layers_per_block": 1,
    "sample_size": world.SIZE,
    "scaling_factor": SCALING,
}
ENCODER = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 224,
    "patch_size": 28,
    "projection_dim": 64,
    "hidden_act": "gelu",
}
HARMONICS = 3  # of a lane's phase, told by the image embedding
_log = logging.getLogger("small_model")


def _run(seed: int, frames: int) -> torch.Tensor:
    """Some successive frames of a seed's clip, from anywhere in it, in -1..1 [frames, 3, H, W]."""
    clip = world.sample(seed)
    start = seed * 37 % 120
    pictures = world.draw(clip, clip.path(start + frames)[start:])
    return torch.from_numpy(pictures).permute(0, 3, 1, 2) * 2 - 1


def train_vae(out: Path, steps: int, seed: int = 0) -> None:
    """Mean absolute error of pictures, with latents held near the spread that SVD's scaling expects."""
    from diffusers import AutoencoderKLTemporalDecoder

    torch.manual_seed(seed)
    vae = AutoencoderKLTemporalDecoder(**VAE)
    # SVD's own file has no such layer; diffusers' class does. Held at identity, the two are the same.
    vae.quant_conv.requires_grad_(False)
    torch.nn.init.dirac_(vae.quant_conv.weight)
    torch.nn.init.zeros_(vae.quant_conv.bias)
    weights = [parameter for parameter in vae.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-3, weight_decay=0.0, betas=(0.9, 0.99), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, steps, pct_start=0.1)
    began = time.monotonic()
    for step in range(steps):
        runs = [_run(2 * step + i, 4) for i in range(2)]
        pixels = torch.cat(runs)
        latents = vae.encode(pixels).latent_dist.mode()
        noisy = latents + torch.randn_like(latents) * 0.02 / SCALING
        decoded = vae.decode(noisy, num_frames=4).sample
        scaled = latents * SCALING
        spread = (scaled.mean((0, 2, 3)).square() + (scaled.std((0, 2, 3)) - 1).square()).mean()
        error = (decoded - pixels).abs().mean()
        loss = error + (decoded - pixels).square().mean() + 0.02 * spread
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            _log.info("vae %d/%d error %.4f spread %.4f (%.0f s)", step, steps, error, spread, time.monotonic() - began)
    vae.eval().save_pretrained(out / "vae")


def finish_decoder(out: Path, steps: int, seed: int = 1) -> None:
    """The decoder alone, on runs of 2 to 14 frames: with 4 only, every frame lies beside an end of its run, and the
    temporal convolutions learn to count on the zeros beyond it."""
    from diffusers import AutoencoderKLTemporalDecoder

    torch.manual_seed(seed)
    vae = AutoencoderKLTemporalDecoder.from_pretrained(out / "vae").requires_grad_(False)
    weights = list(vae.decoder.requires_grad_(True).parameters())
    optimizer = torch.optim.AdamW(weights, lr=3e-4, weight_decay=0.0, betas=(0.9, 0.99), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-4, steps, pct_start=0.1)
    for step in range(steps):
        frames = int(torch.randint(2, 17, ()))
        pixels = _run(5000 + step, frames)
        with torch.no_grad():
            latents = vae.encode(pixels).latent_dist.mode()
        noisy = latents + torch.randn_like(latents) * 0.05 / SCALING
        decoded = vae.decode(noisy, num_frames=frames).sample
        error = (decoded - pixels).abs().mean()
        loss = error + (decoded - pixels).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            _log.info("decoder %d/%d error %.4f", step, steps, error)
    vae.eval().save_pretrained(out / "vae")


def _waves(side: int, channels: int) -> torch.Tensor:
    """Places on a square grid as sines and cosines of half-wave multiples along each axis [side * side, channels]."""
    places = (torch.arange(side) + 0.5) / side * math.pi * torch.arange(1, channels // 4 + 1)[:, None]
    waves = torch.cat([places.cos(), places.sin()])
    down = waves[:, :, None].expand(-1, -1, side)
    across = waves[:, None, :].expand(-1, side, -1)
    return torch.cat([down, across]).flatten(1).T * 0.5


def train_encoder(out: Path, steps: int, seed: int = 0) -> None:
    """The image embedding has to tell, by a linear read-out, each lane's phase, height and colour."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(seed)
    encoder = CLIPVisionModelWithProjection(CLIPVisionConfig(**ENCODER))
    # CLIP's own start drowns places (deviation 0.02) in what patches show; with waves the places are read at once.
    table = encoder.vision_model.embeddings.position_embedding.weight
    with torch.no_grad():
        table[1:] = _waves(ENCODER["image_size"] // ENCODER["patch_size"], ENCODER["hidden_size"])
    told = 2 * HARMONICS + 1
    readout = torch.nn.Linear(ENCODER["projection_dim"], world.LANES * (told + len(world.COLOURS)))
    weights = [*encoder.parameters(), *readout.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=1e-3, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, steps, pct_start=0.1)
    span = world.RIGHT - world.LEFT
    began = time.monotonic()
    for step in range(steps):
        clips = [world.sample(24 * step + i) for i in range(24)]
        pixels = torch.from_numpy(np.concatenate([world.render(clip, 1) for clip in clips]))
        embedding = encoder(clip_vision_pixels(pixels)).image_embeds
        read = readout(embedding).view(len(clips), world.LANES, -1)
        phases = torch.tensor(np.array([np.where(c.kind == 0, 1, -1) * (c.x - world.LEFT) for c in clips]))
        angles = phases[..., None] * math.pi / span * torch.arange(1, HARMONICS + 1)
        heights = torch.tensor(np.array([(c.y - (np.arange(world.LANES) + 0.5) / world.LANES) / 0.04 for c in clips]))
        wanted = torch.cat([angles.cos(), angles.sin(), heights[..., None]], dim=-1).float()
        colours = torch.tensor(np.array([clip.colour for clip in clips]))
        place = functional.mse_loss(read[..., :told], wanted)
        colour = functional.cross_entropy(read[..., told:].flatten(0, 1), colours.flatten())
        scale = (embedding.square().mean() - 1).square()  # CLIP's embeddings are of about unit size
        optimizer.zero_grad()
        (place + 0.3 * colour + 0.01 * scale).backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            _log.info(
                "encoder %d/%d place %.4f colour %.4f (%.0f s)", step, steps, place, colour, time.monotonic() - began
            )
    encoder.eval().save_pretrained(out / "image_encoder")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the two models")
    parser.add_argument("--vae-steps", type=int, default=500)
    parser.add_argument("--decoder-steps", type=int, default=250)
    parser.add_argument("--encoder-steps", type=int, default=3500)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if options.encoder_steps:
        train_encoder(options.out, options.encoder_steps)
    if options.vae_steps:
        train_vae(options.out, options.vae_steps)
    if options.decoder_steps:
        finish_decoder(options.out, options.decoder_steps)


if __name__ == "__main__":
    main()
