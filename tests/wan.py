"""A narrow Wan 2.1 T2V model with random weights, in DiffSynth's layout, which is also ComfyUI's."""

from __future__ import annotations

import torch

import reference
from cogvideox import randomize

DIM, LAYERS, TEXT = 256, 2, 4096  # heads are 128 wide; ComfyUI does not read the width of the text from the file
#: Linear layers of a block that LoRAs change.
BLOCK_MODULES = (
    *(f"{attention}.{name}" for attention in ("self_attn", "cross_attn") for name in "qkvo"), "ffn.0", "ffn.2",
)  # fmt: skip


def reference_model(seed: int = 0) -> torch.nn.Module:
    """DiffSynth's `WanModel`."""
    torch.manual_seed(seed)
    model = reference.module("models.wan_video_dit").WanModel(
        dim=DIM, in_dim=16, ffn_dim=512, out_dim=16, text_dim=TEXT, freq_dim=256, eps=1e-6, patch_size=(1, 2, 2),
        num_heads=DIM // 128, num_layers=LAYERS, has_image_input=False,
    )  # fmt: skip
    randomize(model)
    patchify = model.patchify

    def patchify_to_tokens(x: torch.Tensor) -> tuple[torch.Tensor, torch.Size]:
        """What `WanModel.forward` expects; in 1.1.9 `patchify` does half of it, for the pipeline."""
        patches = patchify(x)
        return patches.flatten(2).transpose(1, 2), patches.shape[2:]

    model.patchify = patchify_to_tokens
    return model.eval()


def block_modules() -> list[str]:
    """The linear layers of all blocks."""
    return [f"blocks.{block}.{module}" for block in range(LAYERS) for module in BLOCK_MODULES]
