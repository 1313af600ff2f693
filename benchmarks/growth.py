"""Time and memory of one UNet call by video length, each in a separate process.

Memory is the size of live tensors on a CPU, and PyTorch's own peak on a GPU.

python run.py bench growth [--size 8] [--width narrow] [--frames 16 32 64 128 256 512]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time

import torch

from . import report
from .live_bytes import LiveBytes
from .memory import MIB


def main() -> int:
    parser = argparse.ArgumentParser(prog="run.py bench growth", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--frames", type=int, nargs="+", default=[16, 32, 64, 128, 256, 512])
    parser.add_argument("--size", type=int, default=8, help="height and width of the latents")
    parser.add_argument("--width", default="narrow", help="widths of the UNet: narrow or full")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(_measure(options.child, options.size, options.width, options.repeats)))
        return 0
    rows = []
    for frames in options.frames:
        arguments = ["--child", str(frames), "--size", str(options.size), "--width", options.width]
        command = [sys.executable, "-m", "benchmarks.growth", *arguments, "--repeats", str(options.repeats)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        rows.append({"frames": frames, **found, "ms_per_frame": 1000 * found["seconds"] / frames})
        print(f"{frames} frames: {found['seconds']:.2f} s, {found['peak_mib']:.0f} MiB", flush=True)
    report.write("growth", rows)
    return 0


def _measure(frames: int, size: int, width: str, repeats: int) -> dict[str, float]:
    from . import unets

    dtype = torch.float16 if torch.cuda.is_available() else torch.float32
    patched = unets.ours(unets.random_weights(width, frames, dtype))
    inputs = unets.Inputs.random(frames, size, dtype)
    with LiveBytes() as counter:
        counter.ignore([list(patched.model.parameters()), vars(inputs)])
        unets.call_ours(patched, inputs)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    times = []
    for _ in range(repeats):
        unets.synchronize()
        began = time.perf_counter()
        unets.call_ours(patched, inputs)
        unets.synchronize()
        times.append(time.perf_counter() - began)
    peak = counter.peak
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated() - before
    return {"seconds": statistics.median(times), "peak_mib": peak / MIB}


if __name__ == "__main__":
    sys.exit(main())
