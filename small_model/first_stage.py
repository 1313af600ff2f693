"""Trains what surrounds the small UNet: the temporal VAE and the image encoder.

    python -m small_model.first_stage --out FOLDER [--vae-steps 6000] [--encoder-steps 2200]

Both are the real architectures (diffusers' `AutoencoderKLTemporalDecoder`, CLIP's vision tower), small, and are
saved as diffusers and transformers folders. The encoder learns to tell what a first frame shows of each lane's shape
(place, height, color, kind): the part that CLIP's general knowledge of pictures plays in SVD. How a shape will set
out is open, and no picture tells it. Each of the two runs resumes from its last checkpoint.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from exvideo_core.video.images import clip_vision_pixels

from . import world
from .scenes import Scenes, as_read

if TYPE_CHECKING:
    from diffusers import AutoencoderKLTemporalDecoder

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
HARMONICS = 3  # of a shape's place, told by the image embedding
LATENT_NOISE = 0.1  # largest deviation of noise on scaled latents: about what a UNet's own error is
LONGEST = 24  # frames of a run that the decoder sees, which is what decoding uses by default
PICTURES = 8  # of a step of the VAE
FIRST_FRAMES = 24  # of a step of the encoder
_WARMUP = 0.05  # share of the steps over which the learning rate rises
_log = logging.getLogger("small_model")


def _rate(step: int, steps: int, rate: float) -> float:
    """A linear rise, then half a cosine down to 0."""
    warmup = max(_WARMUP * steps, 1)
    return rate * min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / steps)))


class _Run:
    """A training run that goes on from its last checkpoint: a model, its optimizer, and a schedule by steps."""

    def __init__(self, checkpoint: Path, model: torch.nn.Module, steps: int, rate: float, every: int = 500) -> None:
        self.checkpoint = checkpoint
        self.model = model
        self.steps = steps
        self.rate = rate
        self.every = every
        self.weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.weights, lr=rate, weight_decay=0.0, betas=(0.9, 0.99), fused=True)
        self.step = 0
        self.began = time.monotonic()
        if checkpoint.exists():
            state = torch.load(checkpoint, map_location=next(model.parameters()).device)
            model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step = state["step"]
            _log.info("%s resumed at step %d", checkpoint.stem, self.step)

    def descend(self, loss: torch.Tensor, **figures: torch.Tensor) -> None:
        """One optimizer step; figures are logged now and then."""
        for group in self.optimizer.param_groups:
            group["lr"] = _rate(self.step, self.steps, self.rate)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.optimizer.step()
        self.step += 1
        if self.step % 100 == 0 or self.step == self.steps:
            text = " ".join(f"{name} {value.item():.5f}" for name, value in figures.items())
            _log.info("%s %d/%d %s (%.0f s)", self.checkpoint.stem, self.step, self.steps, text,
                      time.monotonic() - self.began)  # fmt: skip
        if self.step % self.every == 0 or self.step == self.steps:
            self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
            state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "step": self.step}
            torch.save(state, f"{self.checkpoint}.part")
            os.replace(f"{self.checkpoint}.part", self.checkpoint)


def run_of_pictures(
    step: int, frames: int, clips: int, device: torch.device | str = "cpu", turned: bool = False
) -> torch.Tensor:
    """Successive frames of some clips, from anywhere in them, in -1..1 [clips * frames, 3, H, W].

    Args:
        turned: every shape heads the other way, from the same place at the run's first frame.
    """
    scenes = Scenes.of([world.sample(step * clips + i) for i in range(clips)], device)
    start = torch.randint(200, (clips, 1), generator=torch.Generator().manual_seed(step)).to(device)
    times = start + torch.arange(frames, device=device)
    video = scenes.draw(scenes.centers(2 * start - times if turned else times))
    return as_read(video).flatten(0, 1)


def _identity(vae: AutoencoderKLTemporalDecoder) -> None:
    """Hold the layer at identity that diffusers' class has and SVD's own file has not."""
    vae.quant_conv.requires_grad_(False)
    torch.nn.init.dirac_(vae.quant_conv.weight)
    torch.nn.init.zeros_(vae.quant_conv.bias)


def train_vae(
    out: Path, steps: int, pictures: int = PICTURES, device: torch.device | str = "cpu", seed: int = 0
) -> None:
    """Error of pictures, with latents held near the spread that SVD's scaling expects and noise on them.

    The noise makes neighbouring latents mean neighbouring pictures, and the decoder forgive a UNet's errors.
    """
    from diffusers import AutoencoderKLTemporalDecoder

    torch.manual_seed(seed)
    vae = AutoencoderKLTemporalDecoder(**VAE)
    _identity(vae)
    run = _Run(out / "vae-state.pt", vae.to(device), steps, 1.5e-3)
    while run.step < steps:
        _vae_step(run, vae, pictures, device, seed, mixed=False)
    vae.eval().save_pretrained(out / "vae")


def finish_decoder(
    out: Path, steps: int, pictures: int = LONGEST, device: torch.device | str = "cpu", seed: int = 1
) -> None:
    """The decoder alone, on longer runs: its temporal layers count on the lengths that they have seen.

    Every third step shows it the mean of two futures, which is to look like the mean of their pictures: what a model
    believes before it has chosen is then seen for what it is, in previews and in measures.
    """
    from diffusers import AutoencoderKLTemporalDecoder

    torch.manual_seed(seed)
    vae = AutoencoderKLTemporalDecoder.from_pretrained(out / "vae").requires_grad_(False)
    vae.decoder.requires_grad_(True)
    run = _Run(out / "decoder-state.pt", vae.to(device), steps, 5e-4, every=100)
    while run.step < steps:
        _vae_step(run, vae, pictures, device, seed, mixed=run.step % 3 == 2)
    vae.eval().save_pretrained(out / "vae")


def _vae_step(
    run: _Run, vae: AutoencoderKLTemporalDecoder, pictures: int, device: torch.device | str, seed: int, mixed: bool
) -> None:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + run.step)
    frames = int(torch.randint(1, pictures + 1, (), generator=generator))
    number = seed * 1_000_003 + run.step
    pixels = run_of_pictures(number, frames, pictures // frames, device)
    latents = vae.encode(pixels).latent_dist.mode()
    if mixed:
        other = run_of_pictures(number, frames, pictures // frames, device, turned=True)
        latents = (latents + vae.encode(other).latent_dist.mode()) / 2
        pixels = (pixels + other) / 2
    runs = len(pixels) // frames
    deviation = torch.rand(runs, 1, 1, 1, 1, generator=generator) * LATENT_NOISE / SCALING
    noise = torch.randn(latents.shape, generator=generator).unflatten(0, (-1, frames)) * deviation
    decoded = vae.decode(latents + noise.flatten(0, 1).to(device), num_frames=frames).sample
    scaled = latents * SCALING
    spread = (scaled.mean((0, 2, 3)).square() + (scaled.std((0, 2, 3)) - 1).square()).mean()
    wrong = decoded - pixels
    error, square = wrong.abs().mean(), wrong.square().mean()
    # What flickers is a small error of pictures and a large one of motion.
    flicker = wrong.unflatten(0, (runs, frames)).diff(dim=1).square().sum() / wrong.numel()
    run.descend(error + 4 * square + 8 * flicker + 0.02 * spread, error=error, square=square, flicker=flicker)


def _waves(side: int, channels: int) -> torch.Tensor:
    """Places on a square grid as sines and cosines of half-wave multiples along each axis [side * side, channels]."""
    places = (torch.arange(side) + 0.5) / side * math.pi * torch.arange(1, channels // 4 + 1)[:, None]
    waves = torch.cat([places.cos(), places.sin()])
    down = waves[:, :, None].expand(-1, -1, side)
    across = waves[:, None, :].expand(-1, side, -1)
    return torch.cat([down, across]).flatten(1).T * 0.5


def train_encoder(out: Path, steps: int, device: torch.device | str = "cpu", seed: int = 0) -> None:
    """The image embedding has to tell, by a linear read-out, each lane's place, height, color and kind."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(seed)
    encoder = CLIPVisionModelWithProjection(CLIPVisionConfig(**ENCODER))
    # CLIP's own start drowns places (deviation 0.02) in what patches show; with waves the places are read at once.
    table = encoder.vision_model.embeddings.position_embedding.weight
    with torch.no_grad():
        table[1:] = _waves(ENCODER["image_size"] // ENCODER["patch_size"], ENCODER["hidden_size"])
    told = 2 * HARMONICS + 1
    readout = torch.nn.Linear(ENCODER["projection_dim"], world.LANES * (told + 2))
    model = torch.nn.ModuleDict({"encoder": encoder, "readout": readout}).to(device)
    run = _Run(out / "image_encoder-state.pt", model, steps, 1e-3)
    multiples = torch.arange(1, HARMONICS + 1, device=device)
    lanes = (torch.arange(world.LANES, device=device) + 0.5) / world.LANES
    while run.step < steps:
        clips = [world.sample(FIRST_FRAMES * run.step + i) for i in range(FIRST_FRAMES)]
        scenes = Scenes.of(clips, device)
        embedding = encoder(clip_vision_pixels(scenes.draw(scenes.x[:, None])[:, 0].movedim(1, -1))).image_embeds
        read = readout(embedding).view(len(clips), world.LANES, -1)
        angles = (scenes.x - world.LEFT)[..., None] * math.pi / (world.RIGHT - world.LEFT) * multiples
        heights = (scenes.y - lanes) / 0.04
        place = functional.mse_loss(read[..., :told], torch.cat([angles.cos(), angles.sin(), heights[..., None]], -1))
        red = scenes.color[..., 0] > scenes.color[..., 2]
        looks = torch.stack([red, scenes.disk], dim=-1).float()
        look = functional.binary_cross_entropy_with_logits(read[..., told:], looks)
        scale = (embedding.square().mean() - 1).square()  # CLIP's embeddings are of about unit size
        run.descend(place + 0.3 * look + 0.01 * scale, place=place, look=look)
    encoder.eval().save_pretrained(out / "image_encoder")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the two models")
    parser.add_argument("--vae-steps", type=int, default=6000)
    parser.add_argument("--decoder-steps", type=int, default=1000)
    parser.add_argument("--encoder-steps", type=int, default=2200)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if options.vae_steps:
        train_vae(options.out, options.vae_steps, device=options.device)
    if options.decoder_steps:
        finish_decoder(options.out, options.decoder_steps, device=options.device)
    if options.encoder_steps:
        train_encoder(options.out, options.encoder_steps, options.device)


if __name__ == "__main__":
    main()
