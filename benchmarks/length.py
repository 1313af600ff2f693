"""Beyond the trained length: windows compared to stretched and repeated positions, on the small model in ComfyUI.

    python run.py bench length [--clips 6] [--frames 256]

In the small model's world, a picture does not show in which direction its shapes move: only windows that share frames
can agree on it. The results show how consistent videos are.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace

import numpy as np

from exvideo_core.video.windows import split_windows
from small_model import measure, recipe, world

from . import report
from .long_videos import FADE, OVERLAP, WINDOW, Maker, Row, make_all
from .method_measures import interval

STEPS = 15
_NEAR_WALL = 0.01


def rows() -> list[Row]:
    """All methods to compare."""
    found = [Row("stretch", "stretch"), Row("repeat", "repeat")]
    kinds = [("sequential", anchor, False) for anchor in ("window start", "first picture", "none")]
    kinds += [(fuse, "window start", False) for fuse in ("pyramid", "overlap-linear", "flat")]
    kinds += [("pyramid", anchor, False) for anchor in ("first picture", "none")]
    kinds += [("sequential", "window start", True), ("pyramid", "first picture", True)]
    for fuse, anchor, noise in kinds:
        name = f"{fuse}, {anchor}{', freenoise' if noise else ''}"
        found.append(Row(name, windows={"fuse": fuse, "anchor": anchor, "freenoise": noise}))
    found.append(Row("sequential, window start, own embedding", windows={}, embed=True))
    found += [Row(f"FreeLong, {mode}", mode, freelong=True) for mode in ("stretch", "repeat")]
    # Three quarters of a window, as in FreeNoise's own setting of 16 frames at a stride of 4.
    as_published = {"fuse": "pyramid", "anchor": "first picture", "freenoise": True, "overlap": 3 * WINDOW // 4}
    found.append(Row("FreeNoise as published", windows=as_published))
    for noise in (False, True):
        found.append(Row(f"ComfyUI context windows{', freenoise' if noise else ''}", host_windows={"freenoise": noise}))
    return found


def steps(video: np.ndarray) -> np.ndarray:
    """Mean absolute change of pixels from frame to frame [T - 1]."""
    return np.abs(np.diff(video, axis=0)).mean((1, 2, 3))


def border_step(video: np.ndarray, borders: list[int]) -> float:
    """Mean change from frame to frame near the borders of windows, relative to elsewhere; NaN without borders."""
    change = steps(video)
    near = np.zeros(len(change), dtype=bool)
    for border in borders:
        near[max(border - 2, 0) : border + 2] = True
    return float(change[near].mean() / change[~near].mean()) if borders else float("nan")


def figures(clip: world.Clip, video: np.ndarray, borders: list[int]) -> dict[str, float]:
    """Measure the consistency of a video.

    Args:
        clip: the true clip.
        video: [T, H, W, 3] in 0..1.
        borders: of `window_borders`.
    """
    sighting, change = measure.sight(clip, video), steps(video)
    moved = np.abs(sighting.x[4:] - sighting.x[:-4]) / (4 * clip.speed)
    wall = np.minimum(sighting.x - world.LEFT, world.RIGHT - sighting.x) < 4 * clip.speed + _NEAR_WALL
    turning = wall[4:] | wall[:-4]
    possible = (moved < 1.5) & ((moved > 0.5) | turning)
    return {
        "presence": float(sighting.present.mean()),
        "possible_motion": float(possible.mean()),
        "border_step": border_step(video, borders),
        "largest_step": float(np.percentile(change, 99) / np.median(change)),
        "path_error_128": float(measure.path_error(sighting, clip)[:128].mean()),
        "brightness_drift": float(np.abs(video.mean((1, 2, 3)) - video[0].mean()).mean()),
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="run.py bench length", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--clips", type=int, default=6)
    parser.add_argument("--frames", type=int, nargs="+", default=[256])
    parser.add_argument("--jobs", type=int, default=2, help="number of parallel processes")
    parser.add_argument("--joints-only", action="store_true", help="measure only loops and continued videos")
    options = parser.parse_args()
    maker, table = Maker(recipe.EXTENSION, STEPS), []
    if options.joints_only:
        options.frames = []
    indices = range(options.clips)
    make_all(maker, [(row, i, frames) for frames in options.frames for row in rows() for i in indices], options.jobs)
    for frames in options.frames:
        borders = window_borders(frames)
        for row in rows():
            found = []
            for index in indices:
                clip = world.sample(world.HELD_OUT + index)
                found.append(figures(clip, maker.kept(row, index, frames), borders))
            table.append({"frames": frames, "way": row.name, "clips": options.clips, **_means(found)})
            print(report.markdown(table[-1:]).splitlines()[-1], flush=True)
    if table:
        report.write("length", table)
    _write_joints(maker, options.clips)
    return 0


def _write_joints(maker: Maker, clips: int) -> None:
    report.write("length_joints", [_loops(maker, clips), _continuations(maker, clips)])


def window_borders(frames: int) -> list[int]:
    """Frames at which windows begin or end, except for the video's ends."""
    windows = split_windows(frames, WINDOW, OVERLAP)
    return [found[0] for found in windows[1:]] + [found[-1] + 1 for found in windows[:-1]]


def _means(found: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    return {name: interval(np.array([each[name] for each in found])) for name in found[0]}


def _loops(maker: Maker, clips: int) -> dict[str, object]:
    """Change from the last to the first frame of a closed loop, relative to its largest step."""
    row = Row("loop", windows={"closed_loop": True})
    open_row = replace(row, windows={})
    closed, control = [], []
    for index in range(clips):
        for video, found in ((maker.kept(row, index, 192), closed), (maker.kept(open_row, index, 192), control)):
            found.append(float(np.abs(video[0] - video[-1]).mean() / steps(video).max()))
    return _joint("closed loop of 192 frames, last to first frame; control: without closed_loop", closed, control)


def _continuations(maker: Maker, clips: int, frames: int = 128, overlap: int = 4) -> dict[str, object]:
    """Largest step around the joint of a continued video, relative to the largest step of the video before it."""
    joined, control = [], []
    for index in range(clips):
        first = maker.kept(Row("first"), index, frames)
        second = maker.video(Row("second"), index, frames, keyframes=first[-overlap:])
        own = steps(first).max()
        both = np.concatenate([first[:-FADE], second[overlap - FADE :]])
        joined.append(float(steps(both)[frames - overlap - 1 : frames + 1].max() / own))
        free = maker.video(Row("free"), index, frames, keyframes=first[-1:])
        control.append(float(steps(np.concatenate([first, free[1:]]))[frames - 2 : frames + 1].max() / own))
    return _joint("continued from 4 frames, 3 of them faded; control: from the last frame only", joined, control)


def _joint(name: str, joined: list[float], control: list[float]) -> dict[str, object]:
    return {
        "joint": name,
        "clips": len(joined),
        "of_largest_own_step": interval(np.array(joined)),
        "left_open": interval(np.array(control)),
        "each": joined,
    }


if __name__ == "__main__":
    sys.exit(main())
