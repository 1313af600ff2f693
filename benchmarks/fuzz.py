"""Loads model files that are spoiled in every way, through the nodes' own loaders, and sees each one refused clearly.

    python run.py bench fuzz [--files 10000] [--seed 0]

Four sound files are the start: an extension in fp16 and in fp32, a small checkpoint, and one of SVD's own sizes, whose
gigabytes are a hole in the file. Each file to try is one of them after one mutation; half are extensions. A clear
refusal is a `ModelFileError` that names the file. What else may come out: the file is loaded (a failure where the
mutation leaves no sound file), another exception, a crash (the process dies), a hang (no answer for a minute), or
something is written beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import select
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from . import mutations, report
from .mutations import Mutation, Parts

HANG_SECONDS = 60
BASES = ("fp16.safetensors", "fp32.safetensors", "small.safetensors", "svd.safetensors")
EXTENSIONS = BASES[:2]
OUTCOMES = ("refused", "loaded", "loaded_though_spoiled", "other_exception", "crash", "hang", "left_something")
FAILURES = OUTCOMES[2:]


def main() -> int:
    parser = argparse.ArgumentParser(prog="run.py bench fuzz", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is not None:
        return _work(options.worker)
    began = time.monotonic()
    counts: dict[str, Counter[str]] = {}
    slowest = 0.0
    with tempfile.TemporaryDirectory(prefix="exvideo-fuzz-") as folder:
        worker = _Worker(Path(folder))
        for number in range(options.files):
            case = _case(options.seed, number)
            outcome, message, seconds = worker.try_(case)
            slowest = max(slowest, seconds)
            kind = "extension" if case["base"] in EXTENSIONS else "checkpoint"
            counts.setdefault(f"{kind}: {case['mutation'].replace('_', ' ')}", Counter())[outcome] += 1
            if outcome in FAILURES:
                print(f"{outcome}: file {number}, {case}: {message}", flush=True)
            if (number + 1) % 1000 == 0:
                print(f"{number + 1} files, {time.monotonic() - began:.0f} s", flush=True)
        worker.stop()
    rows = [{"mutation": name, "files": counts[name].total(), **{o: counts[name][o] for o in OUTCOMES}}
            for name in sorted(counts)]  # fmt: skip
    total = {"mutation": "all", **{key: sum(row[key] for row in rows) for key in list(rows[0])[1:]}}
    report.write("fuzz", [*rows, total])
    print(report.markdown([total]) + f"{time.monotonic() - began:.0f} s, the slowest file {slowest:.1f} s")
    return int(any(total[outcome] for outcome in FAILURES))


def _case(seed: int, number: int) -> dict[str, Any]:
    rng = random.Random(f"{seed}-{number}")
    base = rng.choice(
        [*EXTENSIONS, *EXTENSIONS, "small.safetensors", "small.safetensors", "small.safetensors", BASES[3]]
    )
    own = mutations.SPOILING_EXTENSIONS if base in EXTENSIONS else mutations.SPOILING_CHECKPOINTS
    choices: list[Mutation] = [*mutations.SPOILING, *own]
    if base != "svd.safetensors":  # which is a hole: its numbers cannot be disturbed, and 9 GB are not loaded here
        choices += mutations.DISTURBING
    mutation = rng.choice(choices)
    spoiled = mutation not in mutations.DISTURBING
    return {"base": base, "mutation": mutation.__name__, "seed": rng.getrandbits(32), "spoiled": spoiled}


class _Worker:
    """A process that loads files; a new one takes the place of one that died or hung."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process: subprocess.Popen[str] | None = None

    def try_(self, case: dict[str, Any]) -> tuple[str, str, float]:
        """Outcome, message and seconds."""
        if self._process is None:
            command = [sys.executable, "-m", "benchmarks.fuzz", "--worker", str(self._folder)]
            # What a loader writes where it should not, it writes here.
            environment = {**os.environ, "TMPDIR": str(self._folder), "OMP_NUM_THREADS": "1"}
            log = (self._folder / "worker.log").open("a", encoding="utf-8")
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                bufsize=1,
                env=environment,
            )
            log.close()
            self._answer(300)
        began = time.monotonic()
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(case) + "\n")
        answer = self._answer(HANG_SECONDS)
        if answer is None:
            hung = self._process.poll() is None
            self.stop()
            return "hang" if hung else "crash", (self._folder / "worker.log").read_text("utf-8")[-2000:], 0.0
        return answer["outcome"], answer["message"], time.monotonic() - began

    def _answer(self, seconds: float) -> dict[str, Any] | None:
        assert self._process is not None and self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], seconds)
        line = self._process.stdout.readline() if ready else ""
        return json.loads(line) if line else None

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


def _work(folder: Path) -> int:
    """The worker: a case a line comes in, an outcome a line goes out."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # the host prints
    sys.path[:0] = [os.environ["EXVIDEO_HOST"], str(Path(__file__).resolve().parents[1] / "tests")]
    import comfy.options

    comfy.options.enable_args_parsing(False)
    import comfy.cli_args

    comfy.cli_args.args.cpu = True
    import torch

    from exvideo_core.comfyui.checkpoint.load import load_checkpoint
    from exvideo_core.files.safetensors_header import ModelFileError
    from exvideo_core.method.extension import Extension

    torch.set_num_threads(1)
    sound = folder / "sound"
    if not sound.exists():
        sound.mkdir()
        _make_sound_files(sound)
    bases = {name: Parts.read(sound / name) for name in BASES[:3]}
    bases[BASES[3]] = _svd_sized()
    tried = folder / "tried"
    tried.mkdir(exist_ok=True)
    print("{}", file=answers)
    for line in sys.stdin:
        case = json.loads(line)
        path = tried / f"{case['mutation']}.safetensors"
        base = bases[case["base"]]
        parts = Parts(json.loads(json.dumps(base.header)), bytearray(base.data), base.hollow)
        parts.write(path, getattr(mutations, case["mutation"])(parts, random.Random(case["seed"])))
        before = _contents(folder)
        outcome, message = "loaded_though_spoiled" if case["spoiled"] else "loaded", ""
        try:
            if case["base"] in EXTENSIONS:
                Extension.load(path)
            else:
                load_checkpoint(str(path))
        except ModelFileError as error:
            message = str(error)
            outcome = "refused" if path.name in message and len(message) < 1000 else "other_exception"
        except Exception as error:  # the outcome that is looked for
            outcome, message = "other_exception", f"{type(error).__name__}: {error}"
        if _contents(folder) != before:
            outcome, message = "left_something", str(_contents(folder))
        path.unlink()
        print(json.dumps({"outcome": outcome, "message": message}), file=answers)
    return 0


def _contents(folder: Path) -> dict[str, tuple[int, int]]:
    """Files but the log, by size and time of the last change."""
    found = {str(path): path.stat() for path in folder.rglob("*") if path.is_file() and path.name != "worker.log"}
    return {name: (status.st_size, status.st_mtime_ns) for name, status in found.items()}


def _make_sound_files(folder: Path) -> None:
    import shutil

    import torch
    from safetensors.torch import save_file

    from exvideo_core.method import tensor_names
    from small_model import recipe

    generator = torch.Generator().manual_seed(0)
    shapes = tensor_names.extension_shapes([4] * 16, 8, 6)
    content = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    save_file({name: value.half() for name, value in content.items()}, folder / "fp16.safetensors")
    save_file({f"unet.{name}": value for name, value in content.items()}, folder / "fp32.safetensors")
    shutil.copy(recipe.CHECKPOINT, folder / "small.safetensors")


def _svd_sized() -> Parts:
    """The header of a checkpoint of SVD's own sizes in fp16, and its data as a hole."""
    import random_model

    header, size = random_model.svd_header()
    return Parts(header, bytearray(), size)


if __name__ == "__main__":
    sys.exit(main())
