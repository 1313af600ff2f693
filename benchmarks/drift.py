"""Does a long video in windows drift? The small model's videos, measured window by window, in ComfyUI.

    python run.py bench drift [--frames 256 512 1024] [--clips 16 16 4] [--sampling lcm] [--rows NAME ...]
        [--recycled FILE]

A row is an `anchor` of ExVideo Windows, with the image embedding of the video's first frame or of each window's own.
With `--recycled`, an extension that was post-tuned with error recycling is compared with the other one.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

from exvideo_core.video.windows import split_windows
from small_model import measure, recipe, world

from . import report
from .length import border_step, window_borders
from .long_videos import OVERLAP, WINDOW, Maker, Row, make_all
from .method_measures import interval

#: Settings of `Maker` besides the extension.
SAMPLINGS = {"euler": (25,), "lcm": (25, "lcm", 1.0), "fast": (8, "lcm", 1.0, (700.0, 1.0))}
ROWS = (
    Row("window start, own embedding", windows={}, embed=True),
    Row("window start", windows={}),
    Row("first picture", windows={"anchor": "first picture"}),
)


def by_window(clip: world.Clip, video: np.ndarray) -> dict[str, np.ndarray]:
    """Measures of the frames that each window adds to a video [windows].

    Args:
        clip: the true clip.
        video: [T, H, W, 3] in 0..1.
    """
    ends = [window[-1] + 1 for window in split_windows(len(video), WINDOW, OVERLAP)]
    parts = [slice(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    sighting = measure.sight(clip, video)
    frames = {
        "presence": sighting.present,
        "strength": sighting.strength,
        "exchanged": sighting.exchanged,
        "mixed": sighting.mixed,
        "path_error": measure.path_error(sighting, clip),
        "background": np.abs(video - world.background(video.shape[1])).mean((2, 3)) * _gray(video),
    }
    return {name: np.array([values[part].mean() for part in parts]) for name, values in frames.items()}


def _gray(video: np.ndarray) -> np.ndarray:
    """1 in the rows of a frame that show no shape, else 0 [T, H]."""
    return (video.max(-1) - video.min(-1) < 0.1).all(-1)


def slope(values: np.ndarray) -> float:
    """Change per window, by linear regression over the windows."""
    return float(np.polyfit(np.arange(len(values)), values, 1)[0])


def metric(found: list[dict[str, np.ndarray]]) -> dict[str, dict[str, float]]:
    """Mean of each measure and its slope per window, with 95% intervals over videos."""
    result = {}
    for name in found[0]:
        result[name] = interval(np.array([each[name].mean() for each in found]))
        result[f"{name}_slope"] = interval(np.array([slope(each[name]) for each in found]))
    return result


def main() -> int:
    parser = argparse.ArgumentParser(prog="run.py bench drift", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--frames", type=int, nargs="+", default=[256, 512, 1024], help="lengths of the videos")
    parser.add_argument("--clips", type=int, nargs="+", default=[16, 16, 4], help="number of videos of each length")
    parser.add_argument("--extension", type=Path, default=recipe.EXTENSION)
    parser.add_argument("--recycled", type=Path, help="an extension post-tuned with error recycling")
    parser.add_argument(
        "--sampling", choices=SAMPLINGS, default="euler",
        help="25 Euler steps with guidance, 25 steps of lcm without, or 8 of them (fast)",
    )  # fmt: skip
    parser.add_argument(
        "--rows", nargs="+", choices=[row.name for row in ROWS], default=[row.name for row in ROWS], metavar="NAME",
        help="rows to measure: " + ", ".join(f"'{row.name}'" for row in ROWS),
    )  # fmt: skip
    parser.add_argument("--jobs", type=int, default=2, help="number of parallel processes")
    options = parser.parse_args()
    if len(options.clips) != len(options.frames):
        parser.error("--clips needs one number for each length in --frames")
    sizes = list(zip(options.frames, options.clips, strict=True))
    table = []
    for recycled, file in ((False, options.extension), (True, options.recycled)):
        if file is None:
            continue
        maker = Maker(file, *SAMPLINGS[options.sampling])
        rows = [(row, *size) for row in ROWS if row.name in options.rows for size in sizes]
        make_all(maker, [(row, index, frames) for row, frames, clips in rows for index in range(clips)], options.jobs)
        for row, frames, clips in rows:
            found, at_borders, borders = [], [], window_borders(frames)
            for index in range(clips):
                video = maker.kept(row, index, frames)
                found.append(by_window(world.sample(world.HELD_OUT + index), video))
                at_borders.append(border_step(video, borders))
            names = {"row": row.name, "sampling": maker.sampling, "frames": frames, "recycled": recycled}
            figures = {**metric(found), "border_step": interval(np.array(at_borders))}
            table.append({**names, "clips": clips, "metric": figures})
            print(report.markdown([_flat(table[-1])]).splitlines()[-1], flush=True)
    report.write("drift", table, table=[_flat(row) for row in table])
    return 0


def _flat(row: dict) -> dict:
    """The row with its measures as columns."""
    return {**{name: value for name, value in row.items() if name != "metric"}, **row["metric"]}


if __name__ == "__main__":
    sys.exit(main())
