"""A minute of video (1,800 frames) compared to 256 frames, sampled in windows and saved to a file by one server.

    python run.py bench minute [--frames 256 1800] [--steps 8]

Memory is the server's peak resident size during a prompt; the table also shows it before the prompt.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from runner.demo import probe
from runner.hosts import PACK, Host
from runner.server import Server
from small_model import recipe, world

from . import report

WORKFLOW = PACK / "workflows" / "api" / "exvideo_long_video.json"
MIB = 2**20


def main() -> int:
    parser = argparse.ArgumentParser(prog="run.py bench minute", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--frames", type=int, nargs="+", default=[256, 1800])
    parser.add_argument("--steps", type=int, default=8)
    options = parser.parse_args()
    rows = []
    with Server(Host(Path(os.environ["EXVIDEO_HOST"]))) as server:
        from PIL import Image

        image = (world.render(world.sample(world.HELD_OUT), 1)[0] * 255).round().astype(np.uint8)
        Image.fromarray(image).save(server.input / "example.png")
        # The first prompt loads models and libraries, which remain in memory.
        server.run(_prompt(160, 1))
        assert server.process is not None
        process = psutil.Process(server.process.pid)
        for frames in options.frames:
            before, began = process.memory_info().rss, time.monotonic()
            with _Peak(process) as peak:
                result = server.run(_prompt(frames, options.steps), timeout=3600)
            seconds = time.monotonic() - began
            if result.status != "success":
                print(result.error, file=sys.stderr)
                return 1
            (entry,) = next(output["images"] for output in result.outputs.values() if "images" in output)
            found, width, height = probe(server.output / entry["subfolder"] / entry["filename"])
            rows.append({
                "frames": frames, "frames_in_file": found, "pixels": f"{width}x{height}", "seconds": round(seconds, 1),
                "rss_before_mib": round(before / MIB), "peak_mib": round(peak.bytes / MIB),
                "latents_mib": frames * 4 * (width // 8) * (height // 8) * 4 / MIB,
            })  # fmt: skip
            print(report.markdown(rows[-1:]).splitlines()[-1], flush=True)
    report.write("minute", rows)
    return 0


def _prompt(frames: int, steps: int) -> dict[str, Any]:
    graph = json.loads(WORKFLOW.read_text(encoding="utf-8"))
    changes = {
        "ExVideoCheckpointLoader": {"ckpt_name": recipe.CHECKPOINT.name},
        "ExVideoLoader": {"extension_name": recipe.EXTENSION.name},
        "ExVideoConditioning": {"frames": frames, "width": 64, "height": 64},
        "KSampler": {"steps": steps, "cfg": 1.0},
        "ExVideoNormalizeLatent": {"contrast": 1.0},
    }
    for node in graph.values():
        node["inputs"].update(changes.get(node["class_type"], {}))
    return graph


class _Peak:
    """Peak resident size of a process during this context."""

    def __init__(self, process: psutil.Process) -> None:
        self.bytes = 0
        self._process, self._ended = process, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._ended.wait(0.02):
            self.bytes = max(self.bytes, self._process.memory_info().rss)

    def __enter__(self) -> _Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()


if __name__ == "__main__":
    sys.exit(main())
