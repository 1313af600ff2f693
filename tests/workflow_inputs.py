"""The saved workflows on the small model, of few frames; what they read from ComfyUI's input folder."""

from __future__ import annotations

import json

import av
import numpy as np

import other_models
from runner.hosts import PACK
from runner.server import Prompt, Server
from small_model import recipe, world

FOLDER = PACK / "workflows" / "api"
#: The workflows of SVD; `other_models` has the others'.
NAMES = sorted({path.stem for path in FOLDER.glob("*.json")} - set(other_models.TEXT_WIDTHS))
#: Frames of the clip to go on from, and how many of them are held.
CLIP_FRAMES, HELD = 32, 4
#: What a workflow's length and size become: frames, width and height.
CLIP, LONG = (24, 64), (40, 64)
SMALL = {
    "ExVideoCheckpointLoader": {"ckpt_name": recipe.CHECKPOINT.name},
    "ExVideoLoader": {"extension_name": recipe.EXTENSION.name},
    "KSampler": {"steps": 2},
    "AlignYourStepsScheduler": {"steps": 2},
    "KarrasScheduler": {"steps": 2},
    "ExVideoWindows": {"window_frames": 16, "overlap_frames": 4},
}


def small(name: str) -> Prompt:
    """A saved workflow of few frames and small pictures."""
    graph: Prompt = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    frames, size = LONG if name == "exvideo_long_video" else CLIP
    for node in graph.values():
        if node["class_type"] == "UNETLoader":  # which loads SVD only in its published widths
            node.update({"class_type": "ExVideoCheckpointLoader", "inputs": {}})
        kind, inputs = node["class_type"], node["inputs"]
        inputs.update(SMALL.get(kind, {}))
        if kind in ("ExVideoConditioning", "ImageScale"):
            doubled = inputs["width"] == 1024
            inputs.update({"width": size * (1 + doubled), "height": size * (1 + doubled)})
        if kind == "ExVideoConditioning":
            inputs["frames"] = frames
        if kind == "ImageFromBatch" and inputs["batch_index"] == 124:
            inputs["batch_index"] = CLIP_FRAMES - HELD
        if kind == "ImageFromBatch" and inputs["length"] == 125:
            inputs["length"] = CLIP_FRAMES - HELD + 1
    return graph


def give(server: Server) -> None:
    """Put a first and a last picture and a clip into a server's input folder, and the models into its own."""
    from PIL import Image

    (server.models / "checkpoints" / "svd_xt.safetensors").symlink_to(recipe.CHECKPOINT)
    (server.models / "exvideo" / "ExVideo-SVD-128f-v1.fp16.safetensors").symlink_to(recipe.EXTENSION)
    (server.models / "diffusion_models").mkdir(exist_ok=True)
    distilled = server.models / "diffusion_models" / "AnimateLCM-SVD-xt-1-1_fp16_comfy.safetensors"
    distilled.symlink_to(recipe.CHECKPOINT)
    pictures = (world.render(world.sample(world.HELD_OUT), CLIP_FRAMES) * 255).round().astype(np.uint8)
    for name, frame in (("example.png", 0), ("last.png", 20)):
        Image.fromarray(pictures[frame]).save(server.input / name)
    with av.open(str(server.input / "clip.mp4"), "w") as container:
        stream = container.add_stream("libx264", 30, options={"crf": "10"})
        stream.width = stream.height = world.SIZE
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))
        container.mux(stream.encode())
