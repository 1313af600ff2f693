"""Every saved workflow through a real server, from its API file, on the small model and a few frames."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import av
import numpy as np
import pytest

import other_models
import workflow_inputs
from runner.hosts import PACK, Host
from runner.server import Server
from workflow_inputs import CLIP, HELD, LONG, NAMES, SMALL, small

BLUEPRINTS = sorted((PACK / "subgraphs").glob("*.json"))
CONTROLS = ("randomize", "fixed")
OLD = workflow_inputs.CLIP_FRAMES


@pytest.fixture(scope="module")
def server(host_path):
    with Server(Host(host_path)) as server:
        workflow_inputs.give(server)
        yield server


def video(server: Server, result) -> np.ndarray:
    assert result.status == "success", result.error
    entries = [entry for output in result.outputs.values() for entry in output.get("images", [])]
    (entry,) = [entry for entry in entries if entry["filename"].endswith((".mp4", ".mkv"))]
    path = server.output / entry["subfolder"] / entry["filename"]
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


@pytest.mark.parametrize("name", NAMES)
def test_the_workflow_runs(server, name: str) -> None:
    frames, size = LONG if name == "exvideo_long_video" else CLIP
    expected = {
        "exvideo_continue_clip": (OLD + frames - HELD, size),
        "exvideo_second_pass": (frames, 2 * size),
        "exvideo_quickstart": (frames, 64),
        "exvideo_compare": (frames, size + 22, 2 * size),  # two beside each other, below their labels
    }.get(name, (frames, size))
    made = video(server, server.run(small(name)))
    assert made.shape == (expected[0], expected[1], expected[-1], 3)
    assert made.std() > 10  # a picture, not a plain area


@pytest.fixture(scope="module")
def other_server(host_path):
    server = Server(Host(host_path))
    other_models.give_text_pack(server)
    with server:
        yield server


@pytest.mark.parametrize("name", other_models.TEXT_WIDTHS)
def test_the_workflow_of_another_model_runs(other_server, name: str) -> None:
    graph = other_models.small(name)
    missing = {node["class_type"] for node in graph.values()} - other_server.get("/object_info").keys()
    if missing == {"VOIDSampler"}:
        pytest.skip("this ComfyUI has no CogVideoX (0.33 has)")
    assert not missing
    other_models.give(other_server, name)
    made = video(other_server, other_server.run(graph))
    assert made.shape == (other_models.FRAMES, other_models.HEIGHT, other_models.WIDTH, 3)
    assert made.std() > 10
    loader = next(node for node in graph.values() if node["class_type"] == "ExVideoLoraLoader")
    loader["inputs"]["strength_model"] = 0.0
    without = video(other_server, other_server.run(graph))
    assert np.abs(without.astype(int) - made).mean() > 1  # the LoRA has an effect


def flattened(path: Path, source: str) -> tuple[dict, dict[str, list]]:
    """The graph within a blueprint for the API, its input being a node's first output; and where its outputs are."""
    (inner,) = json.loads(path.read_text(encoding="utf-8"))["definitions"]["subgraphs"]
    links = {link["id"]: link for link in inner["links"]}
    graph = {}
    for node in inner["nodes"]:
        inputs = {}
        values = iter([value for value in node["widgets_values"] if value not in CONTROLS])
        for entry in node["inputs"]:
            if "widget" in entry:
                inputs[entry["name"]] = next(values)
            link = links.get(entry["link"])
            if link is None or (link["origin_id"] == -10 and "widget" in entry):  # its own, or the blueprint's widget
                continue
            origin = link["origin_id"]
            inputs[entry["name"]] = [source, 0] if origin == -10 else [str(origin), link["origin_slot"]]
        graph[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    ends = {inner["outputs"][link["target_slot"]]["name"]: [str(link["origin_id"]), link["origin_slot"]]
            for link in inner["links"] if link["target_id"] == -20}  # fmt: skip
    return graph, ends


@pytest.mark.parametrize(
    ("name", "source", "frames", "size"),
    [
        ("Image to Long Video (ExVideo)", "LoadImage", 24, 64),
        ("Continue a Clip (ExVideo)", "GetVideoComponents", OLD + 24 - HELD, 64),
        ("Upscale Pass (ExVideo)", "GetVideoComponents", OLD, 128),
    ],
)
def test_a_blueprint_makes_its_video(server, name: str, source: str, frames: int, size: int) -> None:
    graph, ends = flattened(PACK / "subgraphs" / f"{name}.json", "source")
    known = server.get("/object_info")
    lacking = {node["class_type"] for node in graph.values()} - known.keys()
    if lacking:  # blueprints are for ComfyUI 0.33
        version = tuple(map(int, server.host.version.split(".")))
        assert lacking == {"ComfyMathExpression"} and version < (0, 33)
        pytest.skip(f"ComfyUI {server.host.version} has no {', '.join(lacking)}")
    for node in graph.values():
        node["inputs"].update(SMALL.get(node["class_type"], {}))
        if node["class_type"] == "ExVideoConditioning" and not isinstance(node["inputs"]["frames"], list):
            node["inputs"].update(frames=24, width=64, height=64)
    graph["source"] = {"class_type": source, "inputs": {"image": "example.png"}}
    if source == "GetVideoComponents":
        graph["source"]["inputs"] = {"video": ["file", 0]}
        graph["file"] = {"class_type": "LoadVideo", "inputs": {"file": "clip.mp4"}}
    saved = {"filename_prefix": name, "format": "auto", "codec": "auto", "format.codec": "auto"}
    graph["end"] = {"class_type": "SaveVideo", "inputs": {"video": ends["video"], **saved}}
    made = video(server, server.run(graph))
    assert made.shape == (frames, size, size, 3) and made.std() > 10
    assert known[graph[ends["images"][0]]["class_type"]]["output"][ends["images"][1]] == "IMAGE"


def test_a_second_pass_in_windows_and_tiles(server) -> None:
    graph = small("exvideo_second_pass")
    sampler = next(key for key, node in graph.items() if node["inputs"].get("denoise") == 0.5)
    model = graph[sampler]["inputs"]["model"]
    graph["windows"] = {"class_type": "ExVideoWindows", "inputs": {
        "model": model, "window_frames": 16, "overlap_frames": 4, "fuse": "pyramid", "freenoise": False}}  # fmt: skip
    graph["tiles"] = {"class_type": "ExVideoTiles", "inputs": {
        "model": ["windows", 0], "tile_width": 128, "tile_height": 128, "overlap": 64}}  # fmt: skip
    for node in graph.values():
        if node["inputs"].get("width") == 128:
            node["inputs"].update(width=192, height=192)
    graph[sampler]["inputs"]["model"] = ["tiles", 0]
    assert video(server, server.run(graph)).shape == (24, 192, 192, 3)
    graph["tiles"]["inputs"]["overlap"] = 128
    result = server.run(graph)
    assert result.status == "invalid" and "overlap (128)" in json.dumps(result.error)


def test_cancelled_in_the_middle_of_a_window_the_server_goes_on(server) -> None:
    graph = small("exvideo_long_video")
    save = next(node for node in graph.values() if node["class_type"] == "ExVideoSaveVideo")
    save["inputs"]["codec"] = "ffv1 (lossless)"
    expected = video(server, server.run(graph))
    sampler = next(node for node in graph.values() if node["class_type"] == "KSampler")
    sampler["inputs"].update(seed=1, steps=20)
    timer = []

    def cancel(node: str, step: int, steps: int) -> None:
        if steps > 20 and step > 20 and not timer:
            timer.append(threading.Thread(target=server.interrupt))
            timer[0].start()

    before = sorted(server.output.rglob("*"))
    assert server.run(graph, cancel).status == "interrupted"
    timer[0].join()
    assert sorted(server.output.rglob("*")) == before
    sampler["inputs"].update(seed=0, steps=2)
    save["inputs"]["filename_prefix"] = "video/again"  # not from the host's cache
    assert np.array_equal(video(server, server.run(graph)), expected)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("ExVideoKeyframes", {"frame_indices": "0-99"}, "frame_indices names frame 99"),
        ("ExVideoKeyframes", {"frame_indices": "0-2"}, "4 images are given for the 3 frames"),
        ("ExVideoWindows", {"window_frames": 129}, "Lower window_frames to 128"),
        ("ExVideoWindows", {"overlap_frames": 16}, "smaller than the window"),
        ("ExVideoWindows", {"vae": None}, "connect vae too, or neither"),
        ("ExVideoWindows", {"closed_loop": True, "overlap_frames": 30, "window_frames": 64}, "20 or less"),
    ],
)
def test_impossible_inputs_say_so(server, kind: str, changes: dict, message: str) -> None:
    graph = small("exvideo_long_video" if kind == "ExVideoWindows" else "exvideo_continue_clip")
    node = next(node for node in graph.values() if node["class_type"] == kind)
    inputs = {**node["inputs"], **changes}
    node["inputs"] = {name: value for name, value in inputs.items() if value is not None}
    result = server.run(graph)
    assert result.status == "error"
    assert message in result.error["exception_message"]
    assert result.error["node_type"] == ("KSampler" if "closed_loop" in changes else kind)
