"""What the pictures of an extension and of a denoising show, out of the host's models."""

from __future__ import annotations

from typing import TYPE_CHECKING

import comfy.utils
import torch

from ..method.distances import Distance, distances
from ..video.charts import contact_sheet
from ..video.images import check_latents
from .apply.create import base_weights
from .apply.patch import check_fits, find_transformers
from .vae.conditioning import decode

if TYPE_CHECKING:
    import comfy.sd
    import numpy as np
    from comfy.model_patcher import ModelPatcher
    from PIL.Image import Image

    from ..method.extension import Extension
    from .sampling.recording import Recording

#: Frames that SVD's decoder is shown around one: from there on more change nothing that could be seen.
_NEIGHBOURHOOD = 9


def measure(extension: Extension, base: ModelPatcher | None = None) -> list[Distance]:
    """The distance of each block from its start; of the tuned weights where the base is given.

    Raises:
        ValueError: the base is no SVD, carries an extension, or is not of the extension's widths.
    """
    if base is not None:
        check_fits(extension, find_transformers(base))
    progress = comfy.utils.ProgressBar(len(extension.blocks))
    found = []
    for distance in distances(extension, base_weights(base) if base is not None else None):
        found.append(distance)
        progress.update(1)
    return found


def sheet(vae: comfy.sd.VAE, latents: torch.Tensor, recording: Recording | None, frames: int, edge: int) -> Image:
    """Frames of a clip on one picture, below those of its recorded steps.

    Args:
        latents: the finished clip [T, C, H, W].
        frames: how many of it to show.
        edge: longest side of a frame, in pixels.

    Raises:
        ValueError: the recording is of another clip, or empty.
    """
    check_latents(latents)
    run = None if recording is None else recording.run_of(latents)
    total = len(latents)
    count = min(frames, total)
    chosen = [round(i * (total - 1) / max(count - 1, 1)) for i in range(count)]
    clips = {f"step {step} of {run.steps}": clip for step, clip in run.kept.items()} if run else {}
    # Most samplers end where the model's last prediction is, which would be shown twice.
    if run is None or not torch.allclose(run.kept[max(run.kept)], latents.cpu().float(), atol=1e-3):
        clips["result"] = latents
    rows = [_pictures(vae, clip, chosen) for clip in clips.values()]
    return contact_sheet(rows, list(clips), [f"frame {index}" for index in chosen], edge)


def _pictures(vae: comfy.sd.VAE, clip: torch.Tensor, chosen: list[int]) -> np.ndarray:
    """Frames of a clip, uint8 [N, H, W, 3], each decoded among its neighbours: alone it would have other colours."""
    total = len(clip)
    if len(chosen) * _NEIGHBOURHOOD >= total:
        frames = decode(vae, clip, 24, 12, "smooth")[chosen]
    else:
        starts = [min(max(index - _NEIGHBOURHOOD // 2, 0), total - _NEIGHBOURHOOD) for index in chosen]
        windows = [decode(vae, clip[start : start + _NEIGHBOURHOOD], _NEIGHBOURHOOD, 0, "linear") for start in starts]
        frames = torch.stack(
            [window[index - start] for window, start, index in zip(windows, starts, chosen, strict=True)]
        )
    return (frames * 255).round().clamp(0, 255).byte().cpu().numpy()
