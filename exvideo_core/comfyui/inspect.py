"""What the inspection nodes show: an extension's distance from its base, and the frames of a denoising."""

from __future__ import annotations

from typing import TYPE_CHECKING

import comfy.utils
import torch

from ..method.distances import Distance, distances
from ..video.charts import contact_sheet
from ..video.latents import check_latents
from .apply.create import base_weights
from .model import check_fits, find_transformers
from .vae.decode import decode

if TYPE_CHECKING:
    import comfy.sd
    import numpy as np
    from comfy.model_patcher import ModelPatcher
    from PIL.Image import Image

    from ..method.extension import Extension
    from .sampling.recording import Recording

#: Frames that are decoded together around a single one: more would make no visible difference.
_NEIGHBORHOOD = 9


def measure_distances(extension: Extension, base: ModelPatcher | None = None) -> list[Distance]:
    """The distance of each block from its start; that of the tuned weights only if the base is given.

    Raises:
        ValueError: the base is not an SVD model, has an extension, or has other widths than the extension.
    """
    if base is not None:
        check_fits(extension, find_transformers(base))
    progress = comfy.utils.ProgressBar(len(extension.blocks))
    found = []
    for distance in distances(extension, base_weights(base) if base is not None else None):
        found.append(distance)
        progress.update(1)
    return found


def denoising_sheet(
    vae: comfy.sd.VAE, latents: torch.Tensor, recording: Recording | None, frames: int, edge: int
) -> Image:
    """A contact sheet of a video's frames, with a row for each recorded step above.

    Args:
        latents: the finished video [T, C, H, W].
        frames: how many frames to show.
        edge: longest side of a frame, in pixels.

    Raises:
        ValueError: the recording is empty, or of another video.
    """
    check_latents(latents)
    run = None if recording is None else recording.find_run(latents)
    total = len(latents)
    count = min(frames, total)
    chosen = [round(i * (total - 1) / max(count - 1, 1)) for i in range(count)]
    videos = {f"step {step} of {run.steps}": x0 for step, x0 in run.x0.items()} if run else {}
    # Most samplers end at the model's last prediction, which would be shown twice.
    if run is None or not torch.allclose(run.x0[max(run.x0)], latents.cpu().float(), atol=1e-3):
        videos["result"] = latents
    rows = [_decode_frames(vae, video, chosen) for video in videos.values()]
    return contact_sheet(rows, list(videos), [f"frame {index}" for index in chosen], edge)


def _decode_frames(vae: comfy.sd.VAE, video: torch.Tensor, chosen: list[int]) -> np.ndarray:
    """Frames of a video, uint8 [N, H, W, 3], each decoded with its neighbors: alone its colors would be off."""
    total = len(video)
    if len(chosen) * _NEIGHBORHOOD >= total:
        frames = decode(vae, video, 24, 12, "smooth")[chosen]
    else:
        starts = [min(max(index - _NEIGHBORHOOD // 2, 0), total - _NEIGHBORHOOD) for index in chosen]
        parts = [decode(vae, video[start : start + _NEIGHBORHOOD], _NEIGHBORHOOD, 0, "linear") for start in starts]
        frames = torch.stack([part[index - start] for part, start, index in zip(parts, starts, chosen, strict=True)])
    return (frames * 255).round().clamp(0, 255).byte().cpu().numpy()
