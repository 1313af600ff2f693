"""How few calls of the UNet a video needs: samplers, schedules, guidance and caches, on the small model in ComfyUI.

    python run.py bench steps [--clips 64] [--few-steps FILE] [--rows NAME ...] [--batch 32] [--seconds S]

Videos are kept in the cache folder, so that an interrupted run can be resumed. Results are written after every row.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from runner.environment import cache_folder
from small_model import measure, recipe, world
from small_model.figures import of_clip

from . import kept, report
from . import method_measures as measures
from .steps_rows import Row, few_step_rows, rows

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher
    from comfy.sd import VAE

    from exvideo_core.comfyui.checkpoint.load import LoadedCheckpoint

FRAMES = 128
SEGMENTS = 24, 12  # frames that are decoded together, and their overlap
KEPT = cache_folder() / "bench-steps"
_NOTE = "\nFréchet distances depend on the number of clips: compare only those of rows with the same number.\n"
_CODE = 1  # increase it when videos change, to invalidate the cache


@dataclass(frozen=True)
class Maker:
    """Generates videos, and counts the UNet's calls for one video of each row.

    Attributes:
        base: SVD checkpoint.
        extension: file of the extension.
        batch: clips in a call of the UNet.
        difference: another base, whose difference from `base` is added to the model.
    """

    base: Path
    extension: Path
    batch: int = 1
    difference: Path | None = None

    def path(self, row: Row, index: int) -> Path:
        """Cache file of a video. Its name depends on everything that affects the video."""
        models = kept.digest(self.base), kept.digest(self.extension)
        if self.difference is not None:
            models += (kept.digest(self.difference),)
        parts = [row, *models, FRAMES, self._together(row), torch.cuda.is_available(), _CODE]
        return KEPT / kept.key(parts) / f"{index:03d}.npz"

    def missing(self, row: Row, clips: int) -> list[list[int]]:
        """Clips that are not cached, in batches."""
        left, size = [index for index in range(clips) if not self.path(row, index).exists()], self._together(row)
        return [left[start : start + size] for start in range(0, len(left), size)]

    def _together(self, row: Row) -> int:
        return self.batch if row.cache is None else 1  # ComfyUI's caches decide by the whole batch

    @torch.inference_mode()
    def make(self, row: Row, indices: Sequence[int]) -> None:
        """Generate videos of a row, and write their cache files."""
        latents, calls = self.sample(row, indices)
        for index, video in zip(indices, _decoded(self.base, latents), strict=True):
            # The GPU would wait for compression.
            kept.save(self.path(row, index), video, compress=not torch.cuda.is_available(), calls=calls)

    @torch.inference_mode()
    def sample(self, row: Row, indices: Sequence[int]) -> tuple[torch.Tensor, int]:
        """Latents of clips [N, 128, 4, h, w], sampled together, and the calls of the UNet for each."""
        model = _with_cache(_extended(self.base, self.extension, self.difference).clone(), row)
        import comfy.sample
        import comfy.samplers
        from comfy.patcher_extension import WrappersMP

        from exvideo_core.comfyui.sampling.few_steps import set_sigma_range

        if row.sigmas is not None:
            set_sigma_range(model, *row.sigmas)
        clips = _Clips(model, [_conditions(self.base, index) for index in indices])
        model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "bench_steps", clips.call)
        guider = _guider(model, row)
        guider.set_conds(*clips.conditions)
        guider.set_cfg(row.guidance)
        latent = torch.zeros(FRAMES, 4, world.SIZE // 8, world.SIZE // 8)
        latents = guider.sample(
            torch.cat([comfy.sample.prepare_noise(latent, index) for index in indices]),
            latent.repeat(len(indices), 1, 1, 1), comfy.samplers.sampler_object(row.sampler), _sigmas(model, row),
            disable_pbar=True, seed=indices[0],
        )  # fmt: skip
        return latents.unflatten(0, (-1, FRAMES)), clips.calls


class _Clips:
    """Clips that share the UNet's calls: their conditions, and the calls for each, of which guidance needs two."""

    def __init__(self, model: ModelPatcher, conditions: Sequence[tuple[Any, Any]]) -> None:
        self.calls, device = 0, model.load_device
        self.conditions = [_joined([pair[number][0] for pair in conditions], device) for number in (0, 1)]
        # ComfyUI embeds only one motion bucket for the whole batch.
        embedded = torch.cat([model.model.encode_adm(**positive[0][1]) for positive, _ in conditions])
        self._embedded = embedded.to(device).repeat_interleave(FRAMES, dim=0)

    def call(
        self, executor: Any, x: torch.Tensor, timesteps: torch.Tensor, context: torch.Tensor, y: torch.Tensor,  # noqa: ANN401
        *rest: Any, **named: Any,  # noqa: ANN401
    ) -> torch.Tensor:  # fmt: skip
        """DIFFUSION_MODEL wrapper: tells the UNet that its frames are several videos."""
        conditions = len(x) // len(self._embedded)
        self.calls += conditions
        embedded = self._embedded.to(y).repeat(conditions, 1)
        return executor(x, timesteps, context, embedded, *rest, **{**named, "num_video_frames": FRAMES})


def _joined(conditions: Sequence[Any], device: torch.device) -> list[list[Any]]:
    """One condition of ComfyUI for all clips' frames."""
    latents = torch.cat([values["concat_latent_image"] for _, values in conditions])
    context = torch.cat([each for each, _ in conditions])
    latents, context = (each.to(device).repeat_interleave(FRAMES, dim=0) for each in (latents, context))
    return [[context, {**conditions[0][1], "concat_latent_image": latents}]]


@cache
def _checkpoint(base: Path) -> LoadedCheckpoint:
    import_module("benchmarks.unets")  # adds ComfyUI to the path

    from exvideo_core.comfyui.checkpoint.load import load_checkpoint

    return load_checkpoint(str(base))


@cache
def _extended(base: Path, extension: Path, difference: Path | None) -> ModelPatcher:
    model = _checkpoint(base)[0]
    from exvideo_core.comfyui.apply.patch import apply_extension
    from exvideo_core.method.extension import Extension

    extended = apply_extension(model, Extension.load(extension))
    if difference is None:
        return extended
    from comfy_extras.nodes_model_merging import ModelAdd, ModelSubtract

    subtracted = ModelSubtract().merge(_checkpoint(difference)[0], model, 1.0)[0]
    return ModelAdd().merge(extended, subtracted)[0]


@cache
def _conditions(base: Path, index: int) -> tuple[Any, Any]:
    """Positive and negative conditioning of a clip."""
    _, clip_vision, vae = _checkpoint(base)
    from exvideo_core.comfyui.vae.conditioning import encode_conditioning

    clip = world.sample(world.HELD_OUT + index)
    return encode_conditioning(
        clip_vision, vae, torch.from_numpy(world.render(clip, 1)), width=world.SIZE, height=world.SIZE, fps=30,
        motion_bucket_id=clip.motion_bucket, noise_aug_strength=0.02, seed=index,
    )  # fmt: skip


def _decoded(base: Path, latents: torch.Tensor) -> np.ndarray:
    """Videos of several clips, uint8 [N, 128, H, W, 3]."""
    vae = _checkpoint(base)[2]
    from exvideo_core.comfyui.vae.decode import decode

    together = len(latents) > 1
    videos = _decoded_together(vae, latents) if together else decode(vae, latents[0], *SEGMENTS, "smooth")[None]
    return (videos * 255).round_().to(torch.uint8).cpu().numpy()


def _decoded_together(vae: VAE, latents: torch.Tensor) -> torch.Tensor:
    """As `decode`, by ComfyUI's own decoder, which can decode several videos at once: far fewer kernel launches."""
    import comfy.model_management
    from comfy.ldm.modules.temporal_ae import AE3DConv, VideoResBlock

    from exvideo_core.video.blending import segment_weights, split_segments

    comfy.model_management.load_models_gpu([vae.patcher])
    latents = latents.to(vae.device, vae.vae_dtype)
    videos = latents.new_zeros(len(latents), FRAMES, world.SIZE, world.SIZE, 3, dtype=torch.float32)
    total = torch.zeros(FRAMES)
    layers = [each for each in vae.first_stage_model.decoder.modules() if isinstance(each, AE3DConv | VideoResBlock)]
    for start, end in split_segments(FRAMES, *SEGMENTS):
        for layer in layers:
            layer.forward = partial(_forward, layer, end - start)
        pixels = vae.process_output(vae.first_stage_model.decode(latents[:, start:end].flatten(0, 1)).float())
        weights = segment_weights(start, end, FRAMES, SEGMENTS[1], "smooth").view(-1, 1, 1, 1)
        videos[:, start:end] += pixels.movedim(1, -1).unflatten(0, (len(latents), -1)) * weights.to(pixels)
        total[start:end] += weights.flatten()
    for layer in layers:
        del layer.forward
    return videos / total.view(-1, 1, 1, 1).to(videos)


def _forward(layer: torch.nn.Module, frames: int, x: torch.Tensor, *rest: Any) -> torch.Tensor:  # noqa: ANN401
    """A layer of the decoder on videos of so many frames. After the embedding, ComfyUI 0.33 passes empty caches."""
    return type(layer).forward(layer, x, *rest[:1], timesteps=frames)


def _sigmas(model: ModelPatcher, row: Row) -> torch.Tensor:
    """Noise levels, as KSampler computes them."""
    if row.scheduler == "ays":
        from comfy_extras.nodes_align_your_steps import AlignYourStepsScheduler

        return AlignYourStepsScheduler.execute("SVD", row.steps, 1.0).result[0]
    import comfy.samplers

    return comfy.samplers.KSampler(model, row.steps, "cpu", row.sampler, row.scheduler).sigmas


def _with_cache(model: ModelPatcher, row: Row) -> ModelPatcher:
    if row.cache is None:
        return model
    from comfy_extras import nodes_easycache

    node = getattr(nodes_easycache, f"{row.cache[0]}Node")
    return node.execute(model, row.cache[1], 0.15, 0.95, False).result[0]


def _guider(model: ModelPatcher, row: Row) -> Any:  # noqa: ANN401 - ComfyUI's CFGGuider
    import comfy.samplers

    class IntervalGuider(comfy.samplers.CFGGuider):
        """Guidance within an interval of noise levels only (Kynkaanniemi et al. 2024, arXiv 2404.07724)."""

        def predict_noise(self, x: torch.Tensor, timestep: torch.Tensor, *rest: Any, **named: Any) -> torch.Tensor:  # noqa: ANN401
            if row.interval is not None:  # otherwise, never wait for the GPU
                low, high = row.interval
                self.cfg = row.guidance if low <= float(timestep[0]) <= high else 1.0
            return super().predict_noise(x, timestep, *rest, **named)

    return IntervalGuider(model)


@dataclass(frozen=True)
class Measured:
    """Measures of one video, and its number of shapes that move to the right."""

    metric: dict[str, float]
    right: int
    features: np.ndarray
    calls: int


@cache
def _features() -> measures.Features:
    return measures.Features(measures.FITTED_ON)


def _true_features(seed: int) -> np.ndarray:
    return _features()(world.render(world.sample(seed), FRAMES))


def _measured(path: Path, index: int) -> Measured:
    video, clip = kept.load(path), world.sample(world.HELD_OUT + index)
    measured = of_clip(clip, video)
    return Measured(measured.values, measured.to_the_right, _features()(video), int(np.load(path)["calls"]))


def summary(row: Row, found: Sequence[Measured], true: np.ndarray) -> dict[str, Any]:
    """A row of the results."""
    names = found[0].metric
    metric = {name: measures.interval(np.array([each.metric[name] for each in found])) for name in names}
    metric["frechet"] = measures.frechet_interval(np.stack([each.features for each in found]), true)
    right, shapes = sum(each.right for each in found), len(found) * world.LANES
    low, high = measure.binomial_interval(right, shapes)
    metric["heading_right"] = {"mean": right / shapes, "low": low, "high": high}
    calls = [each.calls for each in found]
    return {"row": row.name, "kind": row.kind, "calls": np.mean(calls).item(), "clips": len(found), "metric": metric}


def _make(maker: Maker, row: Row, indices: Sequence[int], until: float) -> bool:
    """Generate videos, unless it is too late."""
    if in_time := time.time() < until:
        maker.make(row, indices)
    return in_time


def results(
    wanted: Sequence[tuple[Maker, Row, int]], jobs: int, measurers: int, until: float
) -> Iterator[dict[str, Any]]:
    """Generate videos that are not cached, and measure complete rows while the next ones are generated.

    Args:
        wanted: rows, and their numbers of videos.
        jobs, measurers: number of processes of one thread.
        until: time at which no more videos are begun.
    """
    spawn = get_context("spawn")
    of_one_thread = spawn, torch.set_num_threads, (1,)
    with ProcessPoolExecutor(jobs, *of_one_thread) as makers, ProcessPoolExecutor(measurers, *of_one_thread) as eyes:
        made: dict[tuple[Maker, Row, int], list[Future[bool]]] = {
            (maker, row, count): [makers.submit(_make, maker, row, each, until) for each in maker.missing(row, count)]
            for maker, row, count in wanted
        }
        true = np.stack(
            list(eyes.map(_true_features, measures.TRUE_CLIPS, chunksize=-(-len(measures.TRUE_CLIPS) // measurers)))
        )
        for (maker, row, count), videos in made.items():
            try:
                if all([each.result() for each in videos]):
                    paths = [maker.path(row, index) for index in range(count)]
                    yield summary(row, list(eyes.map(_measured, paths, range(count))), true)
            except Exception as error:  # noqa: BLE001 - the other rows may work
                print(f"{row.name} failed: {error!r}", flush=True)


def _makers(options: argparse.Namespace) -> list[tuple[Maker, Row]]:
    """All rows and the models that they sample. Those of few steps come first, in case time ends."""
    base, extension, batch = options.base, options.extension, options.batch
    found = [(Maker(base, options.few_steps, batch), row) for row in few_step_rows("few-step") if options.few_steps]
    if options.few_step_base:
        distilled = {
            "few-step base": Maker(options.few_step_base, extension, batch),
            "few-step base's difference": Maker(base, extension, batch, options.few_step_base),
        }
        if options.few_step_base_extension:
            distilled["distilled on few-step base"] = Maker(
                options.few_step_base, options.few_step_base_extension, batch
            )
        found += [(maker, row) for name, maker in distilled.items() for row in few_step_rows(name)]
    return found + [(Maker(base, extension, batch), row) for row in rows()]


def main() -> int:
    began, cuda = time.time(), torch.cuda.is_available()
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="run.py bench steps", description=__doc__, formatter_class=formatter)
    parser.add_argument("--clips", type=int, default=64, help="videos per row")
    parser.add_argument("--fast-clips", type=int, help="videos per row of other samplers, schedules, guidance, caches")
    parser.add_argument("--base", type=Path, default=recipe.CHECKPOINT)
    parser.add_argument("--extension", type=Path, default=recipe.EXTENSION)
    parser.add_argument("--few-steps", type=Path, help="an extension distilled for few steps")
    parser.add_argument("--few-step-base", type=Path, help="a base distilled for few steps")
    parser.add_argument("--few-step-base-extension", type=Path, help="an extension distilled onto that base")
    parser.add_argument("--rows", nargs="*", help="only rows whose names contain one of these")
    parser.add_argument("--batch", type=int, default=32 if cuda else 1, help="clips in a call of the UNet")
    parser.add_argument("--jobs", type=int, default=1 if cuda else 2, help="number of processes that sample")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop sampling after this time")
    options = parser.parse_args()
    wanted = [
        (maker, row, (row.kind == "fast" and options.fast_clips) or options.clips)
        for maker, row in _makers(options)
        if not options.rows or any(part in row.name for part in options.rows)
    ]
    measurers = min(max((os.cpu_count() or 1) - options.jobs - 1, 1), 12)
    table: list[dict[str, Any]] = []
    for found in results(wanted, options.jobs, measurers, began + options.seconds):
        table.append(found)
        flat = [{**{name: value for name, value in row.items() if name != "metric"}, **row["metric"]} for row in table]
        report.write("steps", table, table=flat, after=_NOTE)
        print(f"{time.time() - began:.0f} s: {found['row']}, {found['calls']:g} calls", flush=True)
    return 0 if len(table) == len(wanted) else 1


if __name__ == "__main__":
    sys.exit(main())
