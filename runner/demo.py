"""Generates the quickstart's video in ComfyUI. Started by `run.py demo` in a Python that can run ComfyUI."""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from .hosts import PACK, Host

WORKFLOW = PACK / "workflows" / "api" / "exvideo_quickstart.json"


def main() -> int:
    from .server import Server

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--host", type=Path, required=True, help="the ComfyUI folder")
    parser.add_argument("--keep", action="store_true", help="keep the server's folder")
    options = parser.parse_args()
    host = Host(options.host)
    started = time.monotonic()
    print(f"Starting ComfyUI {host.version} ...", flush=True)
    with Server(host, keep=options.keep) as server:
        prompt = json.loads(WORKFLOW.read_text(encoding="utf-8"))
        device = server.get("/system_stats")["devices"][0]["name"]
        result = server.run(prompt, lambda node, step, steps: _show(prompt, node, step, steps), timeout=1800)
        print()
        if result.status != "success":
            print(f"Failed ({result.status}): {json.dumps(result.error, indent=2)[:3000]}", file=sys.stderr)
            return 1
        video = _copy_video(server.output, result.outputs)
    frames, width, height = probe(video)
    print(
        f"{video}\n{frames} frames of {width}x{height} in {time.monotonic() - started:.0f} s "
        f"with ComfyUI {host.version} on {device} ({platform.machine()})."
    )
    return 0 if frames == 128 else 1


def quickstart() -> dict[str, dict[str, Any]]:
    """Inputs of the quickstart's nodes, by node class."""
    prompt = json.loads(WORKFLOW.read_text(encoding="utf-8"))
    return {node["class_type"]: node["inputs"] for node in prompt.values()}


def next_target() -> Path:
    """Path for a new video in the pack's `output` folder, with the next free number."""
    folder = PACK / "output"
    folder.mkdir(exist_ok=True)
    numbers = (number for number in range(1, 100_000))
    return next(path for number in numbers if not (path := folder / f"exvideo_{number:05}.mp4").exists())


def probe(video: Path) -> tuple[int, int, int]:
    """Frames, width and height of a video, which is decoded completely."""
    import av

    with av.open(str(video)) as container:
        stream = container.streams.video[0]
        return sum(1 for _ in container.decode(stream)), stream.width, stream.height


def _show(prompt: dict[str, Any], node: str, step: int, steps: int) -> None:
    name = prompt.get(node, {}).get("class_type", node)
    print(f"\r{name}: {step}/{steps}   ", end="", flush=True)


def _copy_video(output: Path, outputs: dict[str, Any]) -> Path:
    entries = [
        entry for node in outputs.values() for kind in ("images", "video", "videos") for entry in node.get(kind, [])
    ]
    entry = next(entry for entry in entries if entry["filename"].endswith(".mp4"))
    return Path(shutil.copyfile(output / entry["subfolder"] / entry["filename"], next_target()))


if __name__ == "__main__":
    sys.exit(main())
