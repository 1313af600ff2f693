"""Past the trained length: windows against stretched and repeated positions, on the small model in the host.

    python run.py bench length [--clips 6] [--frames 192 256]

The small world has a limit that bears on the figures: a clip's first frame alone tells which way its shapes set out,
so nothing but the first window can know the true path. They tell how well clips hold together, not where shapes are.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, replace
from importlib import import_module

import numpy as np
import torch

from small_model import measure, recipe, world

from . import report
from .method_measures import interval

STEPS = 8
WINDOW, OVERLAP = 128, 32  # the defaults of ExVideo Windows
FADE = 3  # of the held frames of a continued clip
_NEAR_WALL = 0.01


@dataclass(frozen=True)
class Row:
    """A way to make a clip: of `Windows` if given, else by a mode of positions."""

    name: str
    positions: str = "trained"
    windows: dict[str, object] | None = None


def rows() -> list[Row]:
    found = [Row("stretch", "stretch"), Row("repeat", "repeat")]
    kinds = [("sequential", anchor, False) for anchor in ("window start", "first picture", "none")]
    kinds += [(fuse, "window start", False) for fuse in ("pyramid", "overlap-linear", "flat")]
    kinds += [("pyramid", anchor, False) for anchor in ("first picture", "none")]
    kinds += [("sequential", "window start", True), ("pyramid", "first picture", True)]
    for fuse, anchor, noise in kinds:
        name = f"{fuse}, {anchor}{', recurring noise' if noise else ''}"
        found.append(Row(name, windows={"fuse": fuse, "anchor": anchor, "freenoise": noise}))
    return found


class Maker:
    """The small model in the host, and clips of it."""

    def __init__(self) -> None:
        import_module("benchmarks.unets")  # puts the host on the path

        from exvideo_core.comfyui.checkpoint.load import load_checkpoint
        from exvideo_core.method.extension import Extension

        self.model, self.clip_vision, self.vae = load_checkpoint(str(recipe.CHECKPOINT))
        self.extension = Extension.load(recipe.EXTENSION)

    def clip(self, row: Row, index: int, frames: int, held: np.ndarray | None = None) -> np.ndarray:
        """0..1 [frames, H, W, 3]; `held` are first frames that are given."""
        import comfy.sample

        from exvideo_core.comfyui.apply.patch import apply_extension
        from exvideo_core.comfyui.sampling.windows import WindowSettings, with_windows
        from exvideo_core.comfyui.vae.conditioning import encode_conditioning
        from exvideo_core.comfyui.vae.decode import decode
        from exvideo_core.comfyui.vae.keyframes import set_keyframes

        clip = world.sample(world.HELD_OUT + index)
        first = torch.from_numpy(world.render(clip, 1) if held is None else held[:1])
        positive, negative = encode_conditioning(
            self.clip_vision, self.vae, first, width=world.SIZE, height=world.SIZE, fps=30,
            motion_bucket_id=clip.motion_bucket, noise_aug_strength=0.02, seed=index,
        )  # fmt: skip
        model = apply_extension(self.model, self.extension, 1.0, row.positions)
        if row.windows is not None:
            model = with_windows(model, WindowSettings(WINDOW, OVERLAP, **row.windows))
        latent = {"samples": torch.zeros(frames, 4, world.SIZE // 8, world.SIZE // 8)}
        if held is not None:
            latent = set_keyframes(self.vae, latent, torch.from_numpy(held), list(range(len(held))), FADE)
        noise = comfy.sample.prepare_noise(latent["samples"], index)
        made = comfy.sample.sample(
            model, noise, STEPS, 1.0, "euler", "karras", positive, negative, latent["samples"],
            noise_mask=latent.get("noise_mask"), seed=index, disable_pbar=True,
        )  # fmt: skip
        return decode(self.vae, made, 24, 12, "smooth").numpy()


def steps(video: np.ndarray) -> np.ndarray:
    """Mean change of a pixel from frame to frame [T - 1]."""
    return np.abs(np.diff(video, axis=0)).mean((1, 2, 3))


def figures(clip: world.Clip, video: np.ndarray, borders: list[int]) -> dict[str, float]:
    """How well a clip holds together.

    Args:
        borders: frames at which a window begins or ends inside of the clip.
    """
    sighting, change = measure.sight(clip, video), steps(video)
    near = np.zeros(len(change), dtype=bool)
    for border in borders:
        near[max(border - 2, 0) : border + 2] = True
    moved = np.abs(sighting.x[4:] - sighting.x[:-4]) / (4 * clip.speed)
    wall = np.minimum(sighting.x - world.LEFT, world.RIGHT - sighting.x) < 4 * clip.speed + _NEAR_WALL
    turning = wall[4:] | wall[:-4]
    possible = (moved < 1.5) & ((moved > 0.5) | turning)
    return {
        "presence": float(sighting.present.mean()),
        "possible_motion": float(possible.mean()),
        "border_step": float(change[near].mean() / change[~near].mean()) if borders else float("nan"),
        "largest_step": float(np.percentile(change, 99) / np.median(change)),
        "path_error_128": float(measure.path_error(sighting, clip)[:128].mean()),
        "brightness_drift": float(np.abs(video.mean((1, 2, 3)) - video[0].mean()).mean()),
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="run.py bench length", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--clips", type=int, default=6)
    parser.add_argument("--frames", type=int, nargs="+", default=[192, 256])
    parser.add_argument("--joints-only", action="store_true", help="only loops and continued clips")
    options = parser.parse_args()
    maker, table = Maker(), []
    if options.joints_only:
        options.frames = []
    for frames in options.frames:
        borders = _borders(frames)
        for row in rows():
            found = []
            for index in range(options.clips):
                clip = world.sample(world.HELD_OUT + index)
                found.append(figures(clip, maker.clip(row, index, frames), borders))
            table.append({"frames": frames, "way": row.name, "clips": options.clips, **_means(found)})
            print(report.markdown(table[-1:]).splitlines()[-1], flush=True)
    if table:
        report.write("length", table)
    _write_joints(maker, options.clips)
    return 0


def _write_joints(maker: Maker, clips: int) -> None:
    report.write("length_joints", [_loops(maker, clips), _continuations(maker, clips)])


def _borders(frames: int) -> list[int]:
    from exvideo_core.comfyui.sampling.windows import WindowSettings

    windows = WindowSettings(WINDOW, OVERLAP).split(frames)
    return [found[0] for found in windows[1:]] + [found[-1] + 1 for found in windows[:-1]]


def _means(found: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    return {name: interval(np.array([each[name] for each in found])) for name in found[0]}


def _loops(maker: Maker, clips: int) -> dict[str, object]:
    """From the last frame of a closed loop to its first, against the loop's largest step."""
    row = Row("loop", windows={"closed_loop": True})
    open_row = replace(row, windows={})
    closed, left_open = [], []
    for index in range(clips):
        for made, found in ((maker.clip(row, index, 192), closed), (maker.clip(open_row, index, 192), left_open)):
            found.append(float(np.abs(made[0] - made[-1]).mean() / steps(made).max()))
    return _joint("closed loop of 192 frames, last to first; left open: without closed_loop", closed, left_open)


def _continuations(maker: Maker, clips: int, frames: int = 128, overlap: int = 4) -> dict[str, object]:
    """The largest step around the joint of a continued clip, against the largest of the clip that it goes on from.

    Only of clips that set out again as clips of this world do: disks to the right, squares to the left.
    """
    joined, cut, index = [], [], 0
    while len(joined) < clips:
        clip = world.sample(world.HELD_OUT + index)
        if clip.sets_out_at(frames - overlap, overlap + 8):
            first = maker.clip(Row("first"), index, frames)
            second = maker.clip(Row("second"), index, frames, held=first[-overlap:])
            own = steps(first).max()
            both = np.concatenate([first[:-FADE], second[overlap - FADE :]])
            joined.append(float(steps(both)[frames - overlap - 1 : frames + 1].max() / own))
            free = maker.clip(Row("free"), index, frames, held=first[-1:])
            cut.append(float(steps(np.concatenate([first, free[1:]]))[frames - 2 : frames + 1].max() / own))
        index += 1
    return _joint("clip continued from 4 frames, 3 of them fading; left open: from its last one", joined, cut)


def _joint(what: str, closed: list[float], left_open: list[float]) -> dict[str, object]:
    return {
        "joint": what,
        "clips": len(closed),
        "of_largest_own_step": interval(np.array(closed)),
        "left_open": interval(np.array(left_open)),
        "each": closed,
    }


if __name__ == "__main__":
    sys.exit(main())
