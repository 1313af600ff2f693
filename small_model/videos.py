"""Writes clips of the synthetic world as a folder of videos, as post-tuning reads them.

python -m small_model.videos --out FOLDER [--clips 300]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from exvideo_core.post_tuning.videos import write_video

from . import world

FRAMES = 128
FPS = 30


def write(folder: Path, clips: int, frames: int = FRAMES, first_seed: int = 0) -> None:
    """Lossless videos, and a metadata.json that tells their motion buckets."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for seed in range(first_seed, first_seed + clips):
        clip = world.sample(seed)
        name = f"{seed:06d}.mkv"
        write_video(folder / name, world.as_bytes(world.render(clip, frames)).numpy(), FPS, lossless=True)
        entries.append({"path": name, "motion_bucket_id": clip.motion_bucket})
    (folder / "metadata.json").write_text(json.dumps(entries, indent=1), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--clips", type=int, default=300)
    parser.add_argument("--frames", type=int, default=FRAMES)
    options = parser.parse_args()
    write(options.out, options.clips, options.frames)


if __name__ == "__main__":
    main()
