"""Videos beyond the trained length, by the small model in ComfyUI, which are cached in a folder."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from inspect import signature
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from runner.environment import cache_folder
from small_model import recipe, world

from . import kept, rivals

if TYPE_CHECKING:
    from exvideo_core.comfyui.checkpoint.load import LoadedCheckpoint
    from exvideo_core.method.extension import Extension

KEPT = cache_folder() / "bench-length"
WINDOW, OVERLAP = 128, 32  # the defaults of ExVideo Windows
FADE = 3  # faded keyframes of a continued video
_WHOLE = 1024  # MiB of a chunk that contains a whole layer of the small model
_CODE = 1  # increase it when videos change, to invalidate the cache


@dataclass(frozen=True)
class Row:
    """A method of making a video longer than the trained length.

    Attributes:
        name: name in the table.
        positions: position mode of the extension.
        windows: settings of ExVideo Windows.
        embed: give ExVideo Windows the image encoder and the VAE.
        host_windows: settings of ComfyUI's own context windows.
        freelong: FreeLong in the temporal attention.
    """

    name: str
    positions: str = "trained"
    windows: dict[str, object] | None = None
    embed: bool = False
    host_windows: dict[str, object] | None = None
    freelong: bool = False


@dataclass(frozen=True)
class Maker:
    """Generates videos with the small model in ComfyUI.

    Attributes:
        extension: file of the extension.
        steps: denoising steps.
        sampler: ComfyUI's name.
        guidance: classifier-free guidance scale.
        sigmas: highest and lowest noise level, other than the model's own.
    """

    extension: Path
    steps: int
    sampler: str = "euler"
    guidance: float = recipe.GUIDANCE
    sigmas: tuple[float, float] | None = None

    @property
    def sampling(self) -> str:
        """How videos are sampled, in words."""
        guidance = f"guidance {self.guidance:g}" if self.guidance != 1 else "no guidance"
        levels = [f"sigma {self.sigmas[0]:g} to {self.sigmas[1]:g}"] if self.sigmas else []
        return ", ".join([self.sampler, f"{self.steps} steps", guidance, *levels])

    def kept(self, row: Row, index: int, frames: int) -> np.ndarray:
        """`video`, from the cache folder if it was generated before."""
        path = self.path(row, index, frames)
        if not path.exists():
            kept.save(path, self.video(row, index, frames))
        return kept.load(path)

    def path(self, row: Row, index: int, frames: int) -> Path:
        """Cache file of a video. Its name depends on everything that affects the video."""
        models = kept.digest(recipe.CHECKPOINT), kept.digest(self.extension)
        parts = [row, *models, self.sampling, frames, WINDOW, OVERLAP, _CODE]
        return KEPT / kept.key(parts) / f"{index:03d}.npz"

    def video(self, row: Row, index: int, frames: int, keyframes: np.ndarray | None = None) -> np.ndarray:
        """Generate a video.

        Args:
            row: the method.
            index: index of the test clip.
            frames: number of frames T.
            keyframes: first frames to continue [N, H, W, 3] in 0..1.

        Returns:
            [T, H, W, 3] in 0..1.
        """
        base, clip_vision, vae = checkpoint()  # makes ComfyUI importable
        import comfy.sample

        from exvideo_core.comfyui.apply.patch import apply_extension
        from exvideo_core.comfyui.low_memory.chunked_unet import with_memory_settings
        from exvideo_core.comfyui.low_memory.estimate import MemorySettings
        from exvideo_core.comfyui.sampling.few_steps import set_sigma_range
        from exvideo_core.comfyui.sampling.windows import WindowSettings, with_windows
        from exvideo_core.comfyui.vae.conditioning import embedding_of_frame, encode_conditioning
        from exvideo_core.comfyui.vae.decode import decode
        from exvideo_core.comfyui.vae.keyframes import set_keyframes

        clip = world.sample(world.HELD_OUT + index)
        first = torch.from_numpy(world.render(clip, 1) if keyframes is None else keyframes[:1])
        positive, negative = encode_conditioning(
            clip_vision, vae, first, width=world.SIZE, height=world.SIZE, fps=30,
            motion_bucket_id=clip.motion_bucket, noise_aug_strength=0.02, seed=index,
        )  # fmt: skip
        model = apply_extension(base, loaded(self.extension), 1.0, row.positions)
        if self.sigmas is not None:
            set_sigma_range(model, *self.sigmas)
        if row.windows is not None:
            settings = WindowSettings(**{"frames": WINDOW, "overlap": OVERLAP, **row.windows})
            model = with_windows(model, settings, partial(embedding_of_frame, clip_vision, vae) if row.embed else None)
        if row.host_windows is not None:
            model = _host_windows(model, **row.host_windows)
        if row.freelong:
            change = partial(rivals.freelong, window=WINDOW, largest=(world.SIZE // 8) ** 2)
            # FreeLong needs all pixels of a frame at once.
            whole = MemorySettings(chunk_megabytes=_WHOLE)
            model = rivals.change_model(with_memory_settings(model, whole), change)
        latent = {"samples": torch.zeros(frames, 4, world.SIZE // 8, world.SIZE // 8)}
        if keyframes is not None:
            indices = list(range(len(keyframes)))
            latent = set_keyframes(vae, latent, torch.from_numpy(keyframes), indices, FADE)
        noise = comfy.sample.prepare_noise(latent["samples"], index)
        latents = comfy.sample.sample(
            model, noise, self.steps, self.guidance, self.sampler, "karras", positive, negative, latent["samples"],
            noise_mask=latent.get("noise_mask"), seed=index, disable_pbar=True,
        )  # fmt: skip
        return decode(vae, latents, 24, 12, "smooth").numpy()


def _host_windows(model: Any, freenoise: bool) -> Any:  # noqa: ANN401 - ComfyUI's ModelPatcher
    """ComfyUI's context windows, without the extra frame per window that SVD fails on."""
    from comfy_extras.nodes_context_windows import ContextWindowsManualNode as Node

    options = {"causal_window_fix": False} if "causal_window_fix" in signature(Node.execute).parameters else {}
    return Node.execute(
        model, WINDOW, OVERLAP, "standard_static", 1, False, "pyramid", 0, freenoise, **options
    ).result[0]  # fmt: skip


def make_all(maker: Maker, wanted: Sequence[tuple[Row, int, int]], jobs: int) -> None:
    """Generate videos (row, index, frames) that are not cached, in processes of one thread."""
    missing = [task for task in wanted if not maker.path(*task).exists()]
    print(f"Generating {len(missing)} videos ...", flush=True)
    with ProcessPoolExecutor(jobs, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        for done, _ in enumerate(pool.map(partial(_make, maker), missing), 1):
            if done % 10 == 0 or done == len(missing):
                print(f"{done} of {len(missing)}", flush=True)


def _make(maker: Maker, task: tuple[Row, int, int]) -> None:
    maker.kept(*task)


@cache
def checkpoint() -> LoadedCheckpoint:
    """The small model in ComfyUI."""
    import_module("benchmarks.unets")  # adds ComfyUI to the path

    from exvideo_core.comfyui.checkpoint.load import load_checkpoint

    return load_checkpoint(str(recipe.CHECKPOINT))


@cache
def loaded(path: Path) -> Extension:
    """An extension's file."""
    from exvideo_core.method.extension import Extension

    return Extension.load(path)
