"""Activation memory of one UNet call: measured on a small UNet, counted without computing at full size.

    python run.py bench memory [--frames 128] [--size 16] [--width narrow] [--chunk-megabytes 128] [--only real|counted]

Real: peak resident memory of a process, minus that with the weights loaded, for this pack and the reference.
Counted: peak bytes of live tensors during a full-size call in fp16 with one condition of 128 frames, using PyTorch's
fake tensors (CPU kernels), for this pack, the reference and a plain port to ComfyUI. Weights are not included.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch

from . import report

MAKERS = ("ours", "reference")
MIB, GIB = 2**20, 2**30


def main() -> int:
    parser = argparse.ArgumentParser(prog="run.py bench memory", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--frames", type=int, default=128)
    parser.add_argument("--size", type=int, default=16, help="height and width of the latents of the real call")
    parser.add_argument("--width", default="narrow", help="widths of the UNet in the real call: narrow or full")
    parser.add_argument("--chunk-megabytes", type=int, default=128, help="chunk size of the counted call")
    parser.add_argument("--only", choices=["real", "counted"])
    parser.add_argument("--child", choices=MAKERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(_measure(options.child, options.width, options.frames, options.size)))
        return 0
    if options.only != "counted":
        report.write("memory_real", _real(options))
    if options.only != "real":
        report.write("memory_counted", _counted(options.frames, options.chunk_megabytes))
    return 0


def _real(options: argparse.Namespace) -> list[dict[str, Any]]:
    found = {}
    for maker in MAKERS:
        arguments = ["--frames", str(options.frames), "--size", str(options.size), "--width", options.width]
        command = [sys.executable, "-m", "benchmarks.memory", "--child", maker, *arguments]
        # By default, glibc keeps freed memory in one arena per thread. A single, trimmed arena shows the actual use.
        environment = {**os.environ, "MALLOC_ARENA_MAX": "1", "MALLOC_TRIM_THRESHOLD_": "0"}
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        found[maker] = json.loads(done.stdout.splitlines()[-1])
        print(f"{maker}: {found[maker]['peak_mib']:.0f} MiB over the weights", flush=True)
    ratio = found["ours"]["peak_mib"] / found["reference"]["peak_mib"]
    print(f"ratio {ratio:.3f}")
    return [
        {
            "width": options.width, "frames": options.frames, "latents": options.size,
            "ours_mib": found["ours"]["peak_mib"], "reference_mib": found["reference"]["peak_mib"], "ratio": ratio,
        }
    ]  # fmt: skip


def _measure(maker: str, width: str, frames: int, size: int) -> dict[str, float]:
    from . import unets

    dtype = torch.float16 if torch.cuda.is_available() else torch.float32
    weights = unets.random_weights(width, frames, dtype)
    inputs = unets.Inputs.random(frames, size, dtype)
    if maker == "ours":
        patched = unets.ours(weights)
        call = lambda: unets.call_ours(patched, inputs)  # noqa: E731
    else:
        unet = unets.theirs(weights)
        call = lambda: unets.call_theirs(unet, inputs)  # noqa: E731
    del weights
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return {"peak_mib": (torch.cuda.max_memory_allocated() - before) / MIB}
    with ResidentMemory() as resident:
        call()
    return {"peak_mib": (resident.peak - resident.before) / MIB}


class ResidentMemory:
    """Samples the resident memory of this process in a thread."""

    def __enter__(self) -> ResidentMemory:
        self.before = self.peak = self._now()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    @staticmethod
    def _now() -> int:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def _watch(self) -> None:
        while not self._done.is_set():
            self.peak = max(self.peak, self._now())
            time.sleep(0.002)


def _counted(frames: int, chunk_megabytes: int) -> list[dict[str, Any]]:
    rows = []
    for pixels in (512, 1024):
        for maker, offload in (("reference", False), ("plain port", False), ("ours", False), ("ours", True)):
            began = time.monotonic()
            peak = count(maker, frames, pixels // 8, chunk_megabytes, offload)
            name = f"{maker}, skip connections in RAM" if offload else maker
            rows.append({"picture": f"{pixels}x{pixels}", "frames": frames, "who": name, "peak_gib": peak / GIB})
            print(f"{pixels} {name}: {peak / GIB:.2f} GiB ({time.monotonic() - began:.0f} s)", flush=True)
    return rows


def count(
    maker: str,
    frames: int,
    size: int,
    chunk_megabytes: int,
    offload: bool = False,
    change: Callable[[Any], Any] = lambda model: model,
    conditions: int = 1,
) -> int:
    """Peak bytes of live tensors in one fp16 call of the full-size UNet.

    Args:
        maker: "ours", "reference" or "plain port".
        frames: number of frames.
        size: height and width of the latents.
        chunk_megabytes, offload: settings of this pack.
        change: applies patches of other nodes to the model; only transformer options are used.
        conditions: number of conditions in the batch, for this pack.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    from exvideo_core.comfyui.low_memory import skip_connections

    from . import unets
    from .live_bytes import LiveBytes

    with FakeTensorMode(allow_non_fake_inputs=True):
        weights = unets.Weights("full", *_fake_weights(unets, frames))
        inputs = unets.Inputs.random(frames, size, torch.float16)
        embedded = torch.empty(1, 768, dtype=torch.float16)
        if maker == "reference":
            model: Any = unets.theirs(weights)
            parameters: Any = list(model.parameters())
            call = lambda: unets.call_theirs(model, inputs)  # noqa: E731
        else:
            model = unets.ours(weights, maker == "plain port", chunk_megabytes, offload, fake=True)
            parameters = list(model.model.parameters())
            changed = change(model)
            call = lambda: unets.call_ours(changed, inputs, embedded, conditions)  # noqa: E731
        counter = LiveBytes()
        take = skip_connections.HostBuffers.take

        def take_uncounted(buffers: skip_connections.HostBuffers, like: torch.Tensor) -> torch.Tensor:
            with counter.paused():
                return take(buffers, like)

        def fetch(self: skip_connections.SkipConnection, start: int, end: int) -> tuple[torch.Tensor, None]:
            part = self.held[start:end]
            return (part.clone() if offload else part), None

        with (
            counter,
            mock.patch.object(skip_connections.HostBuffers, "take", take_uncounted),
            mock.patch.object(skip_connections.SkipConnection, "fetch", fetch),
        ):
            counter.ignore([parameters, weights.base, weights.extension, vars(inputs), embedded])
            call()
    return counter.peak


def _fake_weights(unets: Any, frames: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:  # noqa: ANN401
    shapes = unets.shapes("full", frames)
    return tuple({name: torch.empty(shape, dtype=torch.float16) for name, shape in part.items()} for part in shapes)


if __name__ == "__main__":
    sys.exit(main())
