"""Short prompts for the small model, based on the quickstart workflow, for tests and benchmarks of a server."""

from __future__ import annotations

import copy
import itertools
import json
from typing import Any

from small_model import recipe

from .hosts import PACK
from .server import Prompt

_fresh = itertools.count(1)


def quickstart(**changes: dict[str, Any]) -> Prompt:
    """The quickstart workflow, with changed inputs by node class."""
    graph: Prompt = json.loads((PACK / "workflows" / "api" / "exvideo_quickstart.json").read_text(encoding="utf-8"))
    for node in graph.values():
        node["inputs"].update(changes.get(node["class_type"], {}))
    return graph


def quick(frames: int = 8, steps: int = 2, **changes: dict[str, Any]) -> Prompt:
    """The quickstart with KSampler and guidance, of few frames and steps, saving lossless images.

    Each call uses a new seed for noise of strength 0: the result is the same, but ComfyUI does not take it from its
    cache.
    """
    sampling = changes.pop("KSampler", {})
    conditioning = {"frames": frames, "noise_aug_strength": 0.0, "seed": next(_fresh)}
    graph = quickstart(**{"ExVideoConditioning": conditioning, **changes})
    sampler = graph[find(graph, "SamplerCustom")]
    links = {name: sampler["inputs"][name] for name in ("model", "positive", "negative", "latent_image")}
    settings = {"seed": 0, "steps": steps, "cfg": recipe.GUIDANCE, "sampler_name": "euler", "scheduler": "karras"}
    sampler.update({"class_type": "KSampler", "inputs": {**links, **settings, "denoise": 1.0, **sampling}})
    for kind in ("KSamplerSelect", "KarrasScheduler"):
        del graph[find(graph, kind)]
    for key in [key for key, node in graph.items() if node["class_type"] in ("ImageScale", "CreateVideo", "SaveVideo")]:
        del graph[key]
    saved = {"images": [find(graph, "ExVideoDecode"), 0], "filename_prefix": "frame"}
    graph["save"] = {"class_type": "SaveImage", "inputs": saved}
    return graph


def unpatched(graph: Prompt) -> Prompt:
    """Remove ExVideoApply from a prompt, which then uses the checkpoint's model."""
    graph = copy.deepcopy(graph)
    apply = find(graph, "ExVideoApply")
    model = graph.pop(apply)["inputs"]["model"]
    for node in graph.values():
        node["inputs"] = {name: model if value == [apply, 0] else value for name, value in node["inputs"].items()}
    return graph


def to_file(graph: Prompt, **inputs: Any) -> Prompt:  # noqa: ANN401 - a node's inputs
    """Replace decoding and saving images by ExVideoSaveVideo, with a lossless codec and in a subfolder."""
    graph = copy.deepcopy(graph)
    del graph["save"]
    key = find(graph, "ExVideoDecode")
    settings = {"fps": 24, "codec": "ffv1 (lossless)", "quality": 17, "filename_prefix": "direct/clip"}
    graph[key] = {"class_type": "ExVideoSaveVideo", "inputs": {**graph[key]["inputs"], **settings, **inputs}}
    return graph


def find(graph: Prompt, kind: str) -> str:
    """Id of the first node of a class."""
    return next(key for key, node in graph.items() if node["class_type"] == kind)
