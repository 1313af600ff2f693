"""Seconds and memory on a CUDA card, for `benchmarks.cards --real`. Each part runs in a separate process.

    comparison    one full-size call of the UNet: ours, the reference and a plain port, with the same random weights
    stages        a video from its first image to the file, with ComfyUI's model loading

Each result is written to benchmarks/results/gpu/ immediately.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from runner.environment import cache_folder

from . import model_files

GIB = 2**30
PARTS = ("comparison", "stages")
#: Seconds that a part may take to finish after the time limit, before it is stopped.
_GRACE = 60
_REPEATS = 3


def main(arguments: list[str]) -> int:
    options = _parse(arguments)
    if options.part:
        return _part(options)
    ends = time.time() + options.minutes * 60
    codes = []
    if "stages" in options.parts:
        model_files.make(*_files(options))
    for part in options.parts:
        command = [sys.executable, "-m", "benchmarks.real_card", *arguments, "--part", part, "--ends", str(ends)]
        try:
            codes.append(subprocess.run(command, timeout=max(ends - time.time(), 1) + _GRACE).returncode)
        except subprocess.TimeoutExpired:
            print(f"{part}: stopped, time limit reached", flush=True)
            codes.append(1)
    return max(codes)


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="run.py bench cards --real", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--minutes", type=float, default=4, help="time limit after which no new measurement starts")
    parser.add_argument("--vram", type=float, metavar="GB", help="allocate memory until only this much is free")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--sizes", nargs="+", default=["512x512", "576x1024", "1024x1024"], metavar="WIDTHxHEIGHT")
    parser.add_argument("--frames", type=int, default=128)
    parser.add_argument("--steps", type=int, default=3, help="sampler steps")
    parser.add_argument("--loading", choices=["dynamic", "static"], default="dynamic")
    parser.add_argument("--small", action="store_true", help="use a narrow model and a short video, for a quick test")
    parser.add_argument("--simulate", type=float, metavar="GB", help="use a simulated card of this size")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--ends", type=float, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def _part(options: argparse.Namespace) -> int:
    """Run one part in this process."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with _card(options):
        from . import in_process

        loading = options.loading if options.part == "stages" else "static"
        try:
            in_process.set_up(loading == "dynamic")
        except (ImportError, RuntimeError) as error:
            loading = f"static ({error})"
        import torch

        if not torch.cuda.is_available():
            print("bench cards --real needs a CUDA card, but PyTorch has found none.", file=sys.stderr)
            return 1
        ballast = _hold_all_but(options.vram) if options.vram else None
        results = Results(options, loading)
        {"comparison": _comparison, "stages": _stages}[options.part](options, results)
        del ballast
    return 0


def _files(options: argparse.Namespace) -> tuple[Path, str]:
    """Folder and kind of the model files."""
    kind = "small" if options.small else "random"
    return cache_folder() / f"benchmark_{kind}", kind


def _card(options: argparse.Namespace) -> AbstractContextManager[Any]:
    if not options.simulate:
        return nullcontext()
    from runner import simulated_card

    card = simulated_card.Card(int(options.simulate * GIB))
    simulated_card.install([card], dynamic=options.part == "stages" and options.loading == "dynamic")
    return simulated_card.active()


def _hold_all_but(gigabytes: float) -> Any:  # noqa: ANN401 - a tensor
    """Allocate all but the given amount of memory, and report a correspondingly smaller card to ComfyUI."""
    import torch

    information = torch.cuda.mem_get_info
    free, _ = information()
    size = int(free - gigabytes * GIB)
    if size <= 0:
        raise SystemExit(f"Only {free / GIB:.1f} GB of the card are free, less than {gigabytes:g}.")
    held = torch.empty(size, dtype=torch.uint8, device="cuda")

    def smaller(device: Any = None) -> tuple[int, int]:  # noqa: ANN401 - PyTorch's
        free, total = information(device)
        return free, total - size

    torch.cuda.mem_get_info = torch.cuda.memory.mem_get_info = smaller
    return held


class Results:
    """The results file of a card. Results of other parts are kept."""

    def __init__(self, options: argparse.Namespace, loading: str) -> None:
        import torch

        from . import report

        name = torch.cuda.get_device_name()
        suffix = f" as {options.vram:g} GB" if options.vram else ""
        slug = re.sub(r"[^a-z0-9]+", "-", (name + suffix + (" small" if options.small else "")).lower()).strip("-")
        self._path = report.RESULTS / "gpu" / f"{slug}.json"
        self._part = options.part
        self._ends = options.ends
        self.rows: list[dict[str, Any]] = []
        self._about = {
            "command": " ".join(["python run.py bench cards --real", *_shown(options)]),
            "card": name,
            "memory_gib": torch.cuda.mem_get_info()[1] / GIB,
            "capability": list(torch.cuda.get_device_capability()),
            "machine": report.machine(),
            "cuda": torch.version.cuda,
            "comfyui": _host_version(),
            "loading": loading,
        }

    def add(self, **row: Any) -> None:  # noqa: ANN401 - any figures
        """Add a row and write the file."""
        self.rows.append(row)
        print(json.dumps(row), flush=True)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        found = json.loads(self._path.read_text(encoding="utf-8")) if self._path.exists() else {}
        found[self._part] = {**self._about, "rows": self.rows}
        part = self._path.with_suffix(".part")
        part.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        part.replace(self._path)

    @property
    def out_of_time(self) -> bool:
        """Whether the time limit is reached."""
        return time.time() > self._ends


def _shown(options: argparse.Namespace) -> list[str]:
    defaults = vars(_parse([]))
    hidden = {"part", "ends"}
    changed = {key: value for key, value in vars(options).items() if key not in hidden and value != defaults[key]}
    texts = {key: " ".join(map(str, value)) if isinstance(value, list) else value for key, value in changed.items()}
    return [f"--{key}" if text is True else f"--{key} {text}" for key, text in texts.items()]


def _host_version() -> str:
    from runner.hosts import Host

    return Host(Path(os.environ["EXVIDEO_HOST"])).version


def _comparison(options: argparse.Namespace, results: Results) -> None:
    """Measure one call of the UNet at 512x512, without guidance."""
    import torch

    from . import card_meters, unets

    kind, frames, size = ("narrow", 8, 16) if options.small else ("full", options.frames, 64)
    began = time.perf_counter()
    weights = unets.random_weights(kind, frames, torch.float16, device=torch.device("cuda"))
    inputs = unets.Inputs.random(frames, size, torch.float16)
    results.add(stage="generating weights", seconds=time.perf_counter() - began)
    expected: Any = None
    for who in ("ours", "reference", "plain port", "ours, chunks of 128 MB", "ours, skip connections in RAM"):
        if results.out_of_time:
            results.add(stage=who, error="not started: time limit reached")
            continue
        row: dict[str, Any] = {"stage": who, "frames": frames, "latents": size}
        try:
            call = _unet_call(unets, who, weights, inputs)
            with card_meters.CudaMeter() as meter:
                began = time.perf_counter()
                out = call()
                unets.synchronize()
                row["first_s"] = time.perf_counter() - began
                row |= meter.read()
            if who == "ours":
                expected = out.float()
            elif expected is not None:
                row["distance_from_ours"] = ((out.float() - expected).norm() / expected.norm()).item()
            del out
            row["seconds"] = _repeated(call, unets.synchronize, results)
            if not options.simulate:
                row["kernels"] = _kernels(call)
        except Exception as error:  # noqa: BLE001 - the other results are still useful
            row["error"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        call = None
        unets.free()
        results.add(**row)


def _unet_call(unets: Any, who: str, weights: Any, inputs: Any) -> Callable[[], Any]:  # noqa: ANN401 - a module
    if who == "reference":
        unet = unets.theirs(weights)
        return lambda: unets.call_theirs(unet, inputs)
    chunks = 128 if "chunks" in who else 0
    patched = unets.ours(weights, who == "plain port", chunk_megabytes=chunks, offload_skips="skip connections" in who)
    return lambda: unets.call_ours(patched, inputs)


def _repeated(call: Callable[[], Any], synchronize: Callable[[], None], results: Results) -> list[float]:
    """Seconds of up to three calls, within the time limit."""
    found: list[float] = []
    while len(found) < _REPEATS and not (found and results.out_of_time):
        began = time.perf_counter()
        call()
        synchronize()
        found.append(time.perf_counter() - began)
    return found


def _kernels(call: Callable[[], Any], limit: int = 25) -> list[dict[str, Any]]:
    """The kernels that take up most of a call's time on the card."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as found:
        call()
    events = sorted(found.key_averages(), key=lambda event: -event.self_device_time_total)
    return [
        {"kernel": event.key[:160], "calls": event.count, "ms": event.self_device_time_total / 1000}
        for event in events[:limit]
    ]


def _stages(options: argparse.Namespace, results: Results) -> None:
    """Measure a video of each size, with default settings or the first ones that fit."""
    from . import card_meters, stages

    files = model_files.files(*_files(options))
    sizes = ["128x128"] if options.small else options.sizes
    for size in sizes:
        width, height = map(int, size.split("x"))
        video = stages.Video(width, height, 16 if options.small else options.frames)
        with card_meters.CudaMeter() as meter:
            began = time.perf_counter()
            run = stages.Run(files, video, meter, options.steps)
            results.add(size=size, stage="loading", seconds=time.perf_counter() - began)
            for stage, name, settings in run.stages():
                for setting in settings:
                    if results.out_of_time:
                        results.add(size=size, stage=name, error="not started: time limit reached")
                        break
                    row = run.measure(stage, name, setting)
                    results.add(size=size, frames=video.frames, **asdict(row))
                    if row.fits:
                        break
        results.add(size=size, stage="finite latents", finite=run.finite())
        del run


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
