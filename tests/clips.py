"""Frames as numbers: workflows that end without a loss, and what two servers made of them compared."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import av
import numpy as np

from runner.prompts import find
from runner.server import Prompt, Result, Server


def lossless(graph: Prompt) -> Prompt:
    """The same frames, saved without a loss."""
    graph = copy.deepcopy(graph)
    for node in graph.values():
        if node["class_type"] == "ExVideoSaveVideo":
            node["inputs"]["codec"] = "ffv1 (lossless)"
    if any(node["class_type"] == "SaveVideo" for node in graph.values()):
        del graph[find(graph, "SaveVideo")]
        images = graph.pop(find(graph, "CreateVideo"))["inputs"]["images"]
        graph["save"] = {"class_type": "SaveImage", "inputs": {"images": images, "filename_prefix": "frame"}}
    return graph


def frames(server: Server, graph: Prompt) -> np.ndarray:
    """Run a `lossless` workflow: its frames, uint8 [T, H, W, 3]."""
    return saved(server, graph, server.run(graph))


def saved(server: Server, graph: Prompt, result: Result) -> np.ndarray:
    from PIL import Image

    assert result.status == "success", failure(result)
    kinds = {node["class_type"] for node in graph.values()}
    node = find(graph, "SaveImage" if "SaveImage" in kinds else "ExVideoSaveVideo")
    paths = [server.output / entry["subfolder"] / entry["filename"] for entry in result.outputs[node]["images"]]
    if paths[0].suffix == ".png":
        return np.stack([np.asarray(Image.open(path).convert("RGB")) for path in paths])
    with av.open(str(paths[0])) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def failure(result: Result) -> str:
    """What went wrong, without the tensors that the server shows."""
    error = result.error
    return f"{result.status} in {error.get('node_type')}: {error.get('exception_message', error)}" + "".join(
        error.get("traceback", [])[-3:]
    )


@dataclass(frozen=True)
class Difference:
    """Of two clips, in steps of 255."""

    mean: float
    most: int

    def __str__(self) -> str:
        return f"{self.mean:.3f} of 255 on the mean, {self.most} at most"


#: fp16 on a card against fp32 on a CPU; measured: up to 0.20 on the mean, 19 at most (exvideo_second_pass).
MEAN, MOST = 0.3, 24


def assert_near(clip: np.ndarray, other: np.ndarray, name: str) -> None:
    """Fail unless two clips differ no more than the rounding of fp16 makes them."""
    apart = difference(clip, other)
    print(f"{name}: {apart}")
    assert apart.mean < MEAN and apart.most <= MOST, f"{name}: {apart}"


def difference(clip: np.ndarray, other: np.ndarray) -> Difference:
    assert clip.shape == other.shape
    apart = np.abs(clip.astype(int) - other)
    return Difference(float(apart.mean()), int(apart.max()))
