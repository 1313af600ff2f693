"""How the shipped small model was made, as commands that resume.

    python -m small_model.recipe --out FOLDER

makes everything again: first stage, base, checkpoint, videos, extension, ablations. See README.md for times.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

PACK = Path(__file__).resolve().parents[1]
CHECKPOINT = PACK / "small_model" / "checkpoints" / "exvideo_small.safetensors"
EXTENSION = PACK / "small_model" / "exvideo" / "exvideo_small_128f.safetensors"
SETTINGS = PACK / "small_model" / "post_tuning.yaml"
VIDEOS = 960
STEPS = 4200  # of the shipped extension
ABLATION_STEPS = 300
ABLATIONS: dict[str, tuple[str, ...]] = {
    "full": (),
    "no_convolution": ("--no-train-convolution",),
    "no_positions": ("--no-train-positions",),
    "no_attention": ("--no-train-attention",),
}


def _run(*arguments: str | Path, processes: int = 1) -> None:
    """One thread a process: that is the faster use of few cores for a model this small."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [sys.executable, *(launcher if processes > 1 else []), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(PACK)}
    if processes > 1:
        environment["ACCELERATE_USE_CPU"] = "true"
    subprocess.run(command, cwd=PACK, env=environment, check=True)


def make_videos(out: Path) -> Path:
    """The training videos; metadata.json, written last, says that they are all there."""
    folder = out / "videos"
    if not (folder / "metadata.json").exists():
        _run("-m", "small_model.videos", "--out", folder, "--clips", str(VIDEOS))
    return folder


def post_tune(out: Path, base: Path, name: str, steps: int, options: Sequence[str] = (), processes: int = 1) -> Path:
    """Train an extension by the pack's own command, or go on with it; the finished file."""
    folder = out / name
    given = ["--config", SETTINGS, "--base", base, "--data", make_videos(out), "--out", folder]
    given += ["--cache-folder", out / "cache", "--steps", str(steps), *options]
    _run("-m", "exvideo_core.post_tuning", *given, processes=processes)
    return folder / "extension.safetensors"


def ablations(out: Path, base: Path = CHECKPOINT, jobs: int = 2) -> Path:
    """Train the ablations that are not there yet, `jobs` at a time; the folder with one file each."""
    target = out / "ablations"
    target.mkdir(parents=True, exist_ok=True)
    missing = [name for name in ABLATIONS if not (target / f"{name}.safetensors").exists()]

    def train(name: str) -> None:
        made = post_tune(out, base, f"ablation-{name}", ABLATION_STEPS, ABLATIONS[name])
        shutil.copyfile(made, target / f"{name}.part")
        os.replace(target / f"{name}.part", target / f"{name}.safetensors")

    if missing:
        print(f"Training {len(missing)} ablations of {ABLATION_STEPS} steps each in {out} ...", flush=True)
        make_videos(out)
        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(train, missing))
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    out: Path = options.out.resolve()
    if not (out / "vae").exists() or not (out / "image_encoder").exists():
        _run("-m", "small_model.first_stage", "--out", out)
    if not (out / "unet").exists():
        _run("-m", "small_model.base", "--out", out, processes=options.processes)
    base = out / "exvideo_small.safetensors"
    if not base.exists():
        _run("-m", "small_model.export", "--model", out, "--to", base)
    made = post_tune(out, base, "extension", STEPS, processes=options.processes)
    shutil.copyfile(made, out / "exvideo_small_128f.safetensors")
    ablations(out, base, options.processes)


if __name__ == "__main__":
    main()
