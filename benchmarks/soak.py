"""Hundreds of mixed prompts from two clients on one server, including cancellations and errors.

    python run.py bench soak [--prompts 300] [--seed 0]

A third of the prompts is cancelled or fails: cancelled after a random step, rejected for invalid inputs, stopped by a
bad file or invalid lengths, or by an exception that a node raises during sampling (half of them out-of-memory errors).
All others must match, bit for bit, the results of a server that has run nothing else. Memory, files and threads of the
server are compared between the end and after a sixth of the prompts. Leak warnings are ComfyUI's own: a copy of a model
was deleted, but its entry remains.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import itertools
import json
import os
import random
import shutil
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from runner.hosts import Host
from runner.prompts import find, quick, to_file, unpatched
from runner.server import Prompt, Result, Server
from small_model import recipe

from . import report

MIB = 2**20
CLIENTS = 2
FAULT = """
class SoakFault:
    INPUT_TYPES = classmethod(lambda cls: {"required": {"model": ("MODEL",), "call": ("INT",), "kind": ("STRING",)}})
    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "apply", "soak"

    def apply(self, model, call, kind):
        import comfy.model_management
        seen = iter(range(10**9))
        def wrapper(run, options):
            if next(seen) == call:
                error = comfy.model_management.OOM_EXCEPTION if kind == "memory" else RuntimeError
                raise error("injected")
            return run(options["input"], options["timestep"], **options["c"])
        model = model.clone()
        model.set_model_unet_function_wrapper(wrapper)
        return (model,)

NODE_CLASS_MAPPINGS = {"SoakFault": SoakFault}
"""


@dataclass(frozen=True)
class Case:
    """A prompt and its expected result: `good`, `cancelled`, `invalid`, or `error` at a node of type `node_type`."""

    kind: str
    graph: Prompt
    expected: str
    node_type: str = ""
    after: int = 0  # cancel after this number of steps


def main() -> int:
    parser = argparse.ArgumentParser(prog="run.py bench soak", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--prompts", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    host = Host(Path(os.environ["EXVIDEO_HOST"]))
    rng = random.Random(options.seed)
    with _server(host) as server:
        references = {kind: _digest(server, server.run(make())) for kind, make in GOOD.items()}
    if len(set(references.values())) != len(references):
        print("Two kinds of prompts have the same result, so mix-ups would go unnoticed.", file=sys.stderr)
        return 1
    cases = [_case(rng) for _ in range(options.prompts)]
    counts: Counter[str] = Counter()
    faults: list[str] = []
    with _server(host) as server:
        assert server.process is not None
        process = psutil.Process(server.process.pid)
        usage: list[tuple[float, int, int]] = []
        began = time.monotonic()

        def one(case: Case) -> None:
            problem = _run(server, case, references)
            usage.append((process.memory_info().rss / MIB, process.num_fds(), process.num_threads()))
            counts[case.expected] += 1
            if problem:
                faults.append(f"{case.kind}, {case.expected}: {problem}")
                print(faults[-1], flush=True)
            if len(usage) % 50 == 0:
                print(f"{len(usage)} prompts, {time.monotonic() - began:.0f} s, {usage[-1][0]:.0f} MiB", flush=True)

        with ThreadPoolExecutor(CLIENTS) as clients:
            list(clients.map(one, cases))
        left = [str(path.relative_to(server.base)) for path in server.output.rglob("*") if path.is_file()]
        history = len(json.dumps(server.get("/history")))
        leaks = server.log().count("WARNING, memory leak")
    settled, steps = options.prompts // 6, np.arange(options.prompts)
    memory = np.array([row[0] for row in usage])
    row = {
        "ComfyUI": host.version, "prompts": options.prompts, "clients": CLIENTS,
        **{name: counts[name] for name in ("good", "cancelled", "invalid", "error")}, "wrong": len(faults),
        "files_left": len(left),
        "MiB_after_a_sixth": round(float(np.median(memory[settled : settled + 10]))),
        "MiB_at_the_end": round(float(np.median(memory[-10:]))),
        "MiB_more_every_100_prompts": round(float(np.polyfit(steps[settled:], memory[settled:], 1)[0] * 100), 2),
        "MiB_of_history": round(history / MIB, 2),
        "open_files": [max(r[1] for r in usage[settled : settled + 10]), max(r[1] for r in usage[-10:])],
        "threads": [max(r[2] for r in usage[settled : settled + 10]), max(r[2] for r in usage[-10:])],
        "leak_warnings": leaks, "seconds": round(time.monotonic() - began),
    }  # fmt: skip
    report.write(f"soak_{host.version}", [row])
    print(report.markdown([row]), *left, sep="\n")
    return int(bool(faults or left))


def _patched(node: str, frames: int = 8, steps: int = 2, **inputs: Any) -> Prompt:  # noqa: ANN401 - a node's inputs
    """The quickstart with another node between ExVideoApply and the sampler."""
    graph = quick(frames, steps)
    graph[find(graph, "KSampler")]["inputs"]["model"] = ["more", 0]
    graph["more"] = {"class_type": node, "inputs": {"model": [find(graph, "ExVideoApply"), 0], **inputs}}
    return graph


def _windows(fuse: str, **inputs: Any) -> Prompt:  # noqa: ANN401
    return _patched("ExVideoWindows", 24, window_frames=12, overlap_frames=4, fuse=fuse, freenoise=False, **inputs)


def _embedded_windows() -> Prompt:
    loader = find(quick(), "ExVideoCheckpointLoader")
    return _windows("sequential", clip_vision=[loader, 1], vae=[loader, 2])


def _keyframes() -> Prompt:
    graph = quick()
    graph["other"] = {"class_type": "ExVideoExamplePicture", "inputs": {"seed": 10_000_001}}
    vae, latent = [find(graph, "ExVideoCheckpointLoader"), 2], [find(graph, "ExVideoConditioning"), 2]
    graph["keys"] = {"class_type": "ExVideoKeyframes", "inputs": {
        "vae": vae, "latent": latent, "images": ["other", 0], "frame_indices": "-1"}}  # fmt: skip
    graph[find(graph, "KSampler")]["inputs"]["latent_image"] = ["keys", 0]
    return graph


_names = itertools.count(1)


def _new_extension() -> Prompt:
    name = f"new{next(_names)}"  # a new name, so that ComfyUI does not use its cache
    return {
        "1": {"class_type": "ExVideoCheckpointLoader", "inputs": {"ckpt_name": recipe.CHECKPOINT.name}},
        "2": {"class_type": "ExVideoInit", "inputs": {"model": ["1", 0], "frames": 30}},
        "3": {"class_type": "ExVideoSave",
              "inputs": {"extension": ["2", 0], "filename_prefix": name, "dtype": "fp16"}},
    }  # fmt: skip


GOOD: dict[str, Callable[[], Prompt]] = {
    "video": quick,
    "longer video": lambda: quick(40),
    "half strength": lambda: quick(ExVideoApply={"strength": 0.5}),
    "base": lambda: unpatched(quick()),
    "sequential windows": lambda: _windows("sequential"),
    "windows with their own embeddings": _embedded_windows,
    "averaged windows": lambda: _windows("pyramid"),
    "skip connections in RAM": lambda: _patched("ExVideoMemory", 12, chunk_megabytes=1, offload_skips=True),
    "keyframes": _keyframes,
    "saved to a file": lambda: to_file(quick()),
    "new extension": _new_extension,
}
BAD: dict[str, tuple[Callable[[], Prompt], str]] = {
    "truncated file": (lambda: quick(ExVideoLoader={"extension_name": "cut.safetensors"}), "ExVideoLoader"),
    "checkpoint as extension": (lambda: quick(ExVideoLoader={"extension_name": "base.safetensors"}), "ExVideoLoader"),
    "too many frames": (lambda: quick(129), "KSampler"),
    "windows that are too long": (lambda: _patched("ExVideoWindows", 140, window_frames=130, overlap_frames=4,
                                          fuse="sequential", freenoise=False), "ExVideoWindows"),
    "outside the output folder": (lambda: to_file(quick(), filename_prefix="../clip"), "ExVideoSaveVideo"),
}  # fmt: skip
INVALID: dict[str, Callable[[], Prompt]] = {
    "overlap as long as the segment": lambda: quick(ExVideoDecode={"chunk_frames": 4, "overlap_frames": 4}),
    "strength of 2": lambda: quick(ExVideoApply={"strength": 2.0}),
    "missing file": lambda: quick(ExVideoLoader={"extension_name": "../../secret.safetensors"}),
}


def _case(rng: random.Random) -> Case:
    if rng.random() < 2 / 3:
        kind = rng.choice(list(GOOD))
        return Case(kind, GOOD[kind](), "good")
    way = rng.choice(["cancelled", "cancelled", "fault", "bad", "invalid"])
    if way == "cancelled":
        graph = rng.choice([quick(40, 20), _windows("sequential"), _windows("pyramid")])
        graph[find(graph, "KSampler")]["inputs"]["steps"] = 20
        return Case("long", graph, "cancelled", after=rng.randint(1, 12))
    if way == "fault":
        kind = rng.choice(["memory", "other"])
        graph = _patched("SoakFault", 16, 4, call=rng.randint(0, 3), kind=kind)
        return Case(f"injected, {kind}", graph, "error", "KSampler")
    if way == "bad":
        kind = rng.choice(list(BAD))
        return Case(kind, BAD[kind][0](), "error", BAD[kind][1])
    kind = rng.choice(list(INVALID))
    return Case(kind, INVALID[kind](), "invalid", "ExVideoLoader")


def _server(host: Host) -> Server:
    """A server with bad files and a node that fails."""
    server = Server(host)
    (server.base / "custom_nodes" / "soak_fault.py").write_text(FAULT, encoding="utf-8")
    content = recipe.EXTENSION.read_bytes()
    (server.models / "exvideo" / "cut.safetensors").write_bytes(content[: len(content) // 2])
    shutil.copy(recipe.CHECKPOINT, server.models / "exvideo" / "base.safetensors")
    return server


def _run(server: Server, case: Case, references: dict[str, str]) -> str:
    """Run a case. Returns a description of the problem, or an empty string."""
    ids: list[str] = []
    cancelling: list[threading.Thread] = []

    def progress(node: str, step: int, steps: int) -> None:
        if case.expected == "cancelled" and step >= case.after and not cancelling:
            cancelling.append(threading.Thread(target=server.interrupt, args=ids))
            cancelling[0].start()

    result = server.run(copy.deepcopy(case.graph), progress, on_queued=ids.append)
    for thread in cancelling:
        thread.join()
    ended = {"success": "good", "interrupted": "cancelled"}.get(result.status, result.status)
    if case.expected == "invalid" and ended == "error" and result.error["node_type"] == case.node_type:
        return ""  # ComfyUI 0.3.64 checks this while running
    if ended != case.expected:
        return f"ended with {result.status}: {result.error}"
    if ended == "error" and result.error["node_type"] != case.node_type:
        return f"failed at {result.error['node_type']}: {result.error['exception_message']}"
    if ended == "good" and _digest(server, result) != references[case.kind]:
        return "differs from the result of a fresh server"
    return ""


def _digest(server: Server, result: Result) -> str:
    """Hash of the resulting pixels or tensors. Deletes the files."""
    if result.status != "success":
        return f"{result.status}: {result.error}"
    digest = hashlib.sha256()
    for output in result.outputs.values():
        for entry in [*output.get("images", []), *output.get("extensions", [])]:
            path = server.output / entry["subfolder"] / entry["filename"]
            digest.update(_content(path))
            path.unlink()
    return digest.hexdigest()


def _content(path: Path) -> bytes:
    """Contents of a file, without the metadata, which contain the prompt."""
    if path.suffix == ".safetensors":
        return path.read_bytes()
    if path.suffix == ".png":
        from PIL import Image

        with Image.open(path) as image:
            return image.tobytes()
    import av

    with av.open(str(path)) as container:
        return b"".join(frame.to_ndarray(format="rgb24").tobytes() for frame in container.decode(video=0))


if __name__ == "__main__":
    sys.exit(main())
