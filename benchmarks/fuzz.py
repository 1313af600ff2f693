"""Loads corrupted model files with the nodes' loaders, and checks that each is rejected with a clear error.

    python run.py bench fuzz [--files 10000] [--seed 0]

There are four valid files: an extension in fp16 and in fp32, a small checkpoint, and one in SVD's full size, which is
mostly a hole in a sparse file. Each test file is one of them after one mutation; half of them are extensions. A clear
error is a `ModelFileError` that names the file. Other outcomes: the file is loaded (a failure if the mutation
invalidates it), another exception, a crash (the process dies), a hang (no response for a minute), or additional files
are written.
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
    print(report.markdown([total]) + f"{time.monotonic() - began:.0f} s, slowest file {slowest:.1f} s")
    return int(any(total[outcome] for outcome in FAILURES))


def _case(seed: int, number: int) -> dict[str, Any]:
    rng = random.Random(f"{seed}-{number}")
    base = rng.choice(
        [*EXTENSIONS, *EXTENSIONS, "small.safetensors", "small.safetensors", "small.safetensors", BASES[3]]
    )
    specific = mutations.CORRUPTING_EXTENSIONS if base in EXTENSIONS else mutations.CORRUPTING_CHECKPOINTS
    choices: list[Mutation] = [*mutations.CORRUPTING, *specific]
    if base != "svd.safetensors":  # has no data that could be changed, and 9 GB would be too slow to load
        choices += mutations.ALTERING
    mutation = rng.choice(choices)
    corrupted = mutation not in mutations.ALTERING
    return {"base": base, "mutation": mutation.__name__, "seed": rng.getrandbits(32), "corrupted": corrupted}


class _Worker:
    """A process that loads files. It is replaced if it crashes or hangs."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process: subprocess.Popen[str] | None = None

    def try_(self, case: dict[str, Any]) -> tuple[str, str, float]:
        """Load one file. Returns outcome, message and seconds."""
        if self._process is None:
            command = [sys.executable, "-m", "benchmarks.fuzz", "--worker", str(self._folder)]
            # Files that a loader should not write end up here.
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
    """The worker: reads one case per line and writes one outcome per line."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # ComfyUI prints to stdout
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
    valid = folder / "valid"
    if not valid.exists():
        valid.mkdir()
        _make_valid_files(valid)
    bases = {name: Parts.read(valid / name) for name in BASES[:3]}
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
        outcome, message = "loaded_though_spoiled" if case["corrupted"] else "loaded", ""
        try:
            if case["base"] in EXTENSIONS:
                Extension.load(path)
            else:
                load_checkpoint(str(path))
        except ModelFileError as error:
            message = str(error)
            outcome = "refused" if path.name in message and len(message) < 1000 else "other_exception"
        except Exception as error:
            outcome, message = "other_exception", f"{type(error).__name__}: {error}"
        if _contents(folder) != before:
            outcome, message = "left_something", str(_contents(folder))
        path.unlink()
        print(json.dumps({"outcome": outcome, "message": message}), file=answers)
    return 0


def _contents(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and modification time of all files except the log."""
    found = {str(path): path.stat() for path in folder.rglob("*") if path.is_file() and path.name != "worker.log"}
    return {name: (status.st_size, status.st_mtime_ns) for name, status in found.items()}


def _make_valid_files(folder: Path) -> None:
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
    """A checkpoint in SVD's full size in fp16, whose data is a hole."""
    import random_model

    header, size = random_model.svd_header()
    return Parts(header, bytearray(), size)


if __name__ == "__main__":
    sys.exit(main())
