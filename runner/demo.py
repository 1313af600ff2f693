"""Makes the quickstart's video in a real ComfyUI. Started by `run.py demo`, in a Python that can run the host."""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from .hosts import PACK, Host
from .server import Server

PICTURE = PACK / "examples" / "astronaut.jpg"
WORKFLOW = PACK / "workflows" / "api" / "exvideo_quickstart.json"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--host", type=Path, required=True)
    parser.add_argument("--keep", action="store_true", help="leave the server's folder")
    options = parser.parse_args()
    host = Host(options.host)
    started = time.monotonic()
    server = Server(host, keep=options.keep)
    print(
        f"Making the small model for ComfyUI {host.version} (seeded random weights: expect coloured noise) ...",
        flush=True,
    )
    made = subprocess.run(
        [sys.executable, "-m", "runner.small_model", "--host", str(host.path), "--models", str(server.models)],
        cwd=PACK, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    if made.returncode != 0:
        print(f"FAILED to make the small model:\n{made.stdout[-3000:]}", file=sys.stderr)
        server.remove()
        return 1
    print("Starting the server ...", flush=True)
    with server:
        prompt = json.loads(WORKFLOW.read_text(encoding="utf-8"))
        picture = server.upload_image(PICTURE)
        for node in prompt.values():
            if node["class_type"] == "LoadImage":
                node["inputs"]["image"] = picture
        device = server.get("/system_stats")["devices"][0]["name"]
        result = server.run(prompt, lambda node, step, steps: _show(prompt, node, step, steps), timeout=1800)
        print()
        if result.status != "success":
            print(f"FAILED ({result.status}): {json.dumps(result.error, indent=2)[:3000]}", file=sys.stderr)
            return 1
        video = _keep(server.output, result.outputs)
    frames, width, height = _probe(video)
    print(
        f"{video}\n{frames} frames of {width}x{height} in {time.monotonic() - started:.0f} s, "
        f"by ComfyUI {host.version} on {device} ({platform.machine()}).\n"
        "The weights are random: this shows that it runs, not what ExVideo looks like."
    )
    return 0 if frames == 128 else 1


def _show(prompt: dict[str, Any], node: str, step: int, steps: int) -> None:
    name = prompt.get(node, {}).get("class_type", node)
    print(f"\r{name}: {step}/{steps}   ", end="", flush=True)


def _keep(output: Path, outputs: dict[str, Any]) -> Path:
    """Copy the video to the pack's `output` folder, under the next free number."""
    entries = [
        entry for node in outputs.values() for kind in ("images", "video", "videos") for entry in node.get(kind, [])
    ]
    entry = next(entry for entry in entries if entry["filename"].endswith(".mp4"))
    folder = PACK / "output"
    folder.mkdir(exist_ok=True)
    numbers = (number for number in range(1, 100_000))
    target = next(path for number in numbers if not (path := folder / f"exvideo_{number:05}.mp4").exists())
    return Path(shutil.copyfile(output / entry["subfolder"] / entry["filename"], target))


def _probe(video: Path) -> tuple[int, int, int]:
    import av

    with av.open(str(video)) as container:
        stream = container.streams.video[0]
        return sum(1 for _ in container.decode(stream)), stream.width, stream.height


if __name__ == "__main__":
    sys.exit(main())
