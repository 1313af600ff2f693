"""Cost of the animated preview: sampling on the small model with it, with ComfyUI's own preview, and with none.

    python run.py bench preview [--frames 128] [--steps 8] [--repeats 9]

The three alternate. Images are encoded in a separate thread, as in ComfyUI's server.
"""

from __future__ import annotations

import argparse
import io
import queue
import sys
import threading
import time
from typing import Any

import numpy as np
import torch

from small_model import recipe, world

from . import report
from .long_videos import checkpoint, loaded

KINDS = ("none", "ComfyUI", "animated")


def main() -> int:
    parser = argparse.ArgumentParser(prog="run.py bench preview", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--frames", type=int, default=128)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    sampling, server = _Sampling(options.frames, options.steps), _Server()
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    images: dict[str, int] = dict.fromkeys(KINDS, 0)
    sampling.run("none")  # warms up
    for _ in range(options.repeats):
        for kind in KINDS:
            server.encoded = 0
            began = time.perf_counter()
            sampling.run(kind)
            times[kind].append(time.perf_counter() - began)
            images[kind] += server.encoded
    rows = []
    for kind in KINDS:
        ratios = np.array(times[kind]) / np.array(times["none"])
        low, median, high = np.percentile(ratios, [25, 50, 75])
        rows.append({
            "preview": kind, "frames": options.frames, "steps": options.steps, "seconds": float(np.median(times[kind])),
            "of_none": float(median), "quartiles": [float(low), float(high)],
            "pictures_per_second": images[kind] / sum(times[kind]),
        })  # fmt: skip
        print(report.markdown(rows[-1:]).splitlines()[-1], flush=True)
    report.write("preview", rows)
    return 0


class _Server:
    """Encodes the images of ComfyUI's progress hook in a separate thread, as its server does."""

    def __init__(self) -> None:
        import comfy.utils

        self.encoded = 0
        self._waiting: queue.Queue[Any] = queue.Queue()
        comfy.utils.set_progress_bar_global_hook(self._hook)
        threading.Thread(target=self._encode, daemon=True).start()

    def _hook(self, value: int, total: int, preview: Any, **_: Any) -> None:  # noqa: ANN401
        if preview is not None:
            self._waiting.put(preview)

    def _encode(self) -> None:
        from PIL import ImageOps

        while True:
            kind, image, max_size = self._waiting.get()
            ImageOps.contain(image, (max_size, max_size)).save(io.BytesIO(), format=kind, quality=95)
            self.encoded += 1


class _Sampling:
    def __init__(self, frames: int, steps: int) -> None:
        base, clip_vision, vae = checkpoint()  # makes ComfyUI importable

        from exvideo_core.comfyui.apply.patch import apply_extension
        from exvideo_core.comfyui.vae.conditioning import encode_conditioning

        clip = world.sample(world.HELD_OUT)
        self._steps = steps
        self._conds = encode_conditioning(
            clip_vision, vae, torch.from_numpy(world.render(clip, 1)), width=world.SIZE,
            height=world.SIZE, fps=30, motion_bucket_id=clip.motion_bucket, noise_aug_strength=0.02, seed=0,
        )  # fmt: skip
        self._latent = torch.zeros(frames, 4, world.SIZE // 8, world.SIZE // 8)
        self._noise = torch.randn(self._latent.shape, generator=torch.Generator().manual_seed(0))
        self._model = apply_extension(base, loaded(recipe.EXTENSION))

    def run(self, kind: str) -> None:
        import comfy.cli_args
        import comfy.sample
        import latent_preview
        from comfy.patcher_extension import WrappersMP

        methods = latent_preview.LatentPreviewMethod
        comfy.cli_args.args.preview_method = methods.NoPreviews if kind == "none" else methods.Auto
        model = self._model.clone()
        if kind != "animated":
            model.remove_wrappers_with_key(WrappersMP.OUTER_SAMPLE, "exvideo_preview")
        comfy.sample.sample(
            model, self._noise, self._steps, 1.0, "euler", "karras", *self._conds, self._latent, seed=0,
            callback=latent_preview.prepare_callback(model, self._steps), disable_pbar=True,
        )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
