"""Does post-tuning work? Compares 128-frame videos of base, extension and ablations to the true videos.

    python run.py bench method [--clips 64] [--lcm-clips 128] [--ablation-clips 32] [--jobs 2]

Uses the small model. The ablations' extensions are not included in this repository, and trained first if needed: see
`small_model/README.md`. Generated videos are kept in the cache folder, so that an interrupted run can be resumed.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from runner.environment import cache_folder
from runner.hosts import PACK
from small_model import clips, measure, recipe, world
from small_model.figures import of_clip
from small_model.held_out import SIGMAS, HeldOut

from . import method_measures as measures
from . import method_plots as plots
from . import report
from .method_rows import FRAMES, LCM, Maker, Row, ablation_rows, main_rows, make_all

RESULTS = PACK / "benchmarks" / "results"
CURVE_MEASURES = ("presence", "exchanged", "mixed", "path_error")
#: Measures of each clip, and features of the videos [N, D].
_Measured = tuple[list[dict[str, float]], np.ndarray]
_log = logging.getLogger("bench")


def main() -> int:
    parser = argparse.ArgumentParser(prog="run.py bench method", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--clips", type=int, default=64, help="videos per main row")
    parser.add_argument("--lcm-clips", type=int, default=128, help="videos per row of the sampler lcm")
    parser.add_argument("--ablation-clips", type=int, default=32, help="videos per ablation (0: skip ablations)")
    parser.add_argument("--curve-clips", type=int, default=6, help="videos of the one-step denoising curve")
    parser.add_argument("--jobs", type=int, default=2, help="number of parallel processes")
    parser.add_argument("--device", default="cpu", help="device on which videos are generated")
    parser.add_argument("--half", action="store_true", help="compute the UNet in bfloat16, compiled")
    parser.add_argument("--base", type=Path, default=recipe.CHECKPOINT)
    parser.add_argument("--extension", type=Path, default=recipe.EXTENSION)
    parser.add_argument(
        "--work", type=Path, default=cache_folder() / "small-model", help="folder for training the ablations"
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stdout)

    kept = cache_folder() / "bench-method"
    options.results.mkdir(parents=True, exist_ok=True)
    rows = main_rows(options.extension)
    wanted = [(row, options.lcm_clips if row.sampling == LCM else options.clips) for row in rows]
    maker = Maker(options.base, kept, options.device, options.half)
    make_all(maker, wanted, options.jobs)
    table, by_frame = _measure(maker, wanted)
    own_length = _own_length(maker, options.clips)
    curve = _curve(Maker(options.base, kept, options.device), options.extension, options.curve_clips)
    _write(options.results / "method", table, rows, own_length, denoising=curve)
    plotted = [row for row in rows if row.sampling != LCM]
    titles = {row.name: row.title for row in plotted}
    plots.paths({name: by_frame[name] for name in titles}, titles, options.results / "method_path.png")
    plots.curve(curve, options.results / "method_denoising.png")
    shown = {row.title: maker.clip(row, 0) for row in plotted}
    plots.contact_sheet(shown, options.results / "method_frames.png")
    if options.ablation_clips:
        _ablations(options, kept)
    return 0


def _ablations(options: argparse.Namespace, kept: Path) -> None:
    """Train and measure the ablations."""
    folder = recipe.ablations(options.work, options.base, options.extension, jobs=options.jobs)
    wanted = [(row, options.ablation_clips) for row in ablation_rows(folder)]
    maker = Maker(options.base, kept, options.device, options.half)
    make_all(maker, wanted, options.jobs)
    table, _ = _measure(maker, wanted)
    _write(options.results / "method_ablations", table, [row for row, _ in wanted])


def _write(
    target: Path,
    table: list[dict],
    rows: Sequence[Row],
    own_length: dict[str, dict[str, float]] | None = None,
    **more: object,
) -> None:
    results = {
        "command": " ".join(["python run.py bench method", *sys.argv[1:]]),
        "machine": report.machine(),
        "frames": FRAMES, "sampling": {row.name: asdict(row.sampling) for row in rows if not row.truth},
        "rows": table, "base_at_25_frames": own_length, **more,
    }  # fmt: skip
    target.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    text = plots.markdown(table, {row.name: row.title for row in rows}, own_length)
    target.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


def _measure(maker: Maker, wanted: list[tuple[Row, int]]) -> tuple[list[dict], dict[str, np.ndarray]]:
    features = measures.Features(measures.FITTED_ON)
    true = np.stack([features(world.render(world.sample(seed), FRAMES)) for seed in measures.TRUE_CLIPS])
    table, by_frame, by_row = [], {}, {}
    for row, count in wanted:
        found, errors, seen, right = [], [], [], 0
        for index in range(count):
            video = maker.clip(row, index)
            clip = world.sample(world.HELD_OUT + index)
            measured = of_clip(clip, video)
            right += measured.to_the_right
            found.append(measured.values)
            errors.append(measured.nearest.error.mean(1))
            seen.append(features(video))
        metric = {name: measures.interval(np.array([clip[name] for clip in found])) for name in found[0]}
        metric["frechet"] = measures.frechet_interval(np.stack(seen), true)
        shapes = count * world.LANES
        low, high = measure.binomial_interval(right, shapes)
        heading = {"share": right / shapes, "low": low, "high": high}
        table.append({"row": row.name, "clips": count, "metric": metric, "heading_right": heading})
        by_frame[row.name] = np.stack(errors)
        by_row[row.name] = found, np.stack(seen)
        _log.info("Measured %s.", row.name)
    for entry, (row, _) in zip(table, wanted, strict=True):
        if row.opponent in by_row:
            entry["extended_minus_this"] = _difference(by_row[row.opponent], by_row[row.name], true)
    return table, by_frame


def _difference(
    first: tuple[list[dict[str, float]], np.ndarray],
    second: tuple[list[dict[str, float]], np.ndarray],
    true: np.ndarray,
) -> dict[str, dict[str, float]]:
    """Differences between two rows' measures, clip by clip, with 95% intervals.

    Args:
        first, second: the rows.
        true: features of true videos.
    """
    pairs = list(zip(first[0], second[0], strict=True))
    found = {name: measures.interval(np.array([a[name] - b[name] for a, b in pairs])) for name in first[0][0]}
    return {**found, "frechet": measures.frechet_difference(first[1], second[1], true)}


def _own_length(maker: Maker, count: int) -> dict[str, dict[str, float]]:
    """Measure the base at its native 25 frames."""
    svd = maker.model(Row("base", ""))
    found, at_once = [], 1 if maker.device == "cpu" else count
    for start in range(0, count, at_once):
        seeds = range(start, min(start + at_once, count))
        scenes = [world.sample(world.HELD_OUT + seed) for seed in seeds]
        videos = clips.make(svd, scenes, svd.frames, seeds)
        found += [of_clip(clip, video).values for clip, video in zip(scenes, videos, strict=True)]
    return {name: measures.interval(np.array([clip[name] for clip in found])) for name in found[0]}


def _curve(maker: Maker, extension: Path, count: int) -> list[dict]:
    """Errors after a single denoising step, by noise level. The ideal rows are the least that is possible."""
    rows = [("ideal at 25 frames", None, 25), ("base at 25 frames", None, 25), ("ideal", None, FRAMES),
            ("(a) base", None, FRAMES), ("(b) untrained", "untrained", FRAMES),
            ("(c) post-tuned", str(extension), FRAMES)]  # fmt: skip
    found = []
    for title, model, frames in rows:
        svd = maker.model(Row(title, title, model))
        held = HeldOut.of(svd, count, frames)
        levels = []
        for sigma in SIGMAS:
            clean = held.ideal(sigma) if title.startswith("ideal") else held.one_step(svd.unet, sigma)
            pairs = zip(held.clips, held.decode(clean), strict=True)
            figures = [of_clip(clip, video).values for clip, video in pairs]
            level = {name: measures.interval(np.array([each[name] for each in figures])) for name in CURVE_MEASURES}
            levels.append({"sigma": sigma, "mse": measures.interval(held.errors(clean)), **level})
        found.append({"row": title, "frames": frames, "clips": count, "levels": levels})
        _log.info("Measured the denoising curve of %s.", title)
    return found


if __name__ == "__main__":
    sys.exit(main())
