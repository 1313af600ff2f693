"""How the shipped small model was made, as commands that resume.

    python -m small_model.recipe --out FOLDER

makes everything again: first stage, base, checkpoint, extension, ablations. See README.md for times; with
`--device cuda` base and extension are trained on a GPU.
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
GUIDANCE = 2.0  # classifier-free guidance of all frames to sample with, as in the reference's example
#: Training runs of the base, each of which continues the one before. From the second on, at several frame rates.
BASE_RUNS: tuple[str, ...] = (
    "--batch 48 --steps 2910 --rate 1.2e-3",
    "--batch 24 --steps 1400 --rate 3e-4 --muon --warmup 30 --ema 0.99 --clips 256 --clip-frames 192 --skips 1 2 4",
    "--batch 24 --steps 600 --rate 2e-4 --muon --warmup 30 --ema 0.99 --clips 256 --clip-frames 192 --skips 1 1 2 4"
    " --seed 5",
)
#: Training runs of the extension, each of which continues the one before.
EXTENSION_RUNS: tuple[str, ...] = (
    "--batch 16 --steps 2213 --rate 1e-3 --positions-rate 10",
    "--batch 4 --steps 1900 --rate 1.5e-4 --positions-rate 5 --muon --warmup 20 --ema 0.985 --clips 96"
    " --clip-frames 192 --noise interval --noise-low 3 --noise-high 60 --noise-share 0.85",
    "--batch 16 --steps 1231 --rate 3e-4 --positions-rate 5 --muon --warmup 50 --seed 3"
    " --noise interval --noise-low 2 --noise-high 150 --noise-share 0.7",
    "--batch 40 --steps 648 --rate 3e-4 --positions-rate 5 --muon --warmup 50 --seed 13"
    " --noise interval --noise-low 4 --noise-high 100 --noise-share 0.8",
    "--batch 4 --steps 1200 --rate 1.5e-4 --positions-rate 5 --muon --warmup 20 --ema 0.985 --clips 256"
    " --clip-frames 192 --noise interval --noise-low 3 --noise-high 100 --noise-share 0.75",
    "--batch 4 --steps 1500 --rate 1.5e-4 --positions-rate 5 --muon --warmup 20 --ema 0.985 --clips 256"
    " --clip-frames 192 --noise interval --noise-low 1.5 --noise-high 100 --noise-share 0.75 --seed 7",
)
#: Run that continues the extension, as a whole or without a part.
ABLATION_RUN = (
    "--batch 4 --steps 300 --rate 3e-4 --positions-rate 5 --muon --warmup 20 --ema 0.985 --clips 96 --clip-frames 192"
    " --noise interval --noise-low 3 --noise-high 100 --noise-share 0.7"
)
ABLATIONS: dict[str, tuple[str, ...]] = {
    "full": (),
    "no_convolution": ("--without", "convolution"),
    "no_positions": ("--without", "positions"),
    "no_attention": ("--without", "attention"),
}


_CPU = ["--bf16", "--compile"]


def _run(*arguments: str | Path) -> None:
    """One thread a process: that is the faster use of few cores for a model this small."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(PACK)}
    subprocess.run([sys.executable, *map(str, arguments)], cwd=PACK, env=environment, check=True)


def _train(part: str, result: str, runs: Sequence[str], out: Path, options: Sequence[str | Path]) -> Path:
    """Run the training runs of a part that are not finished. Returns the file of the last one."""
    made: list[Path] = []
    for number, settings in enumerate(runs, 1):
        folder = out / f"{part}-{number}"
        init = ("--init", made[-1]) if made else ()
        made.append(folder / result)
        if not made[-1].exists():
            _run("-m", f"small_model.{part}", "--out", folder, *options, *init, *settings.split())
    return made[-1]


def ablations(
    out: Path, base: Path = CHECKPOINT, extension: Path = EXTENSION, device: Sequence[str] = (), jobs: int = 1
) -> Path:
    """Train the ablations whose files do not exist yet, in parallel processes. Returns their folder."""
    target = out / "ablations"
    target.mkdir(parents=True, exist_ok=True)

    def train(name: str) -> None:
        run, file = out / f"ablation-{name}", target / f"{name}.safetensors"
        given = ["--base", base, "--init", extension, *(device or _CPU), *ABLATION_RUN.split(), *ABLATIONS[name]]
        _run("-m", "small_model.extension", "--out", run, *given)
        shutil.copyfile(run / "extension.safetensors", f"{file}.part")
        os.replace(f"{file}.part", file)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(train, [name for name in ABLATIONS if not (target / f"{name}.safetensors").exists()]))
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cpu", help="where base and extension are trained")
    options = parser.parse_args()
    out: Path = options.out.resolve()
    if not (out / "vae").exists() or not (out / "image_encoder").exists():
        _run("-m", "small_model.first_stage", "--out", out)
    device = ["--device", "cuda", "--bf16", "--graph"] if options.device == "cuda" else _CPU
    own = ["--first-stage", out, *device]
    base = _train("base", "base.safetensors", BASE_RUNS, out, own)
    shutil.copyfile(base, out / CHECKPOINT.name)
    extension = _train("extension", "extension.safetensors", EXTENSION_RUNS, out, ["--base", base, *device])
    shutil.copyfile(extension, out / EXTENSION.name)
    ablations(out, base, extension, device)


if __name__ == "__main__":
    main()
