"""Workflows through real servers on simulated cards: near a CPU's frames, and the same where weights load alike."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

import clips
import other_models
from runner.prompts import find, quick
from runner.server import Prompt, Server
from runner.simulated_card import trace
from small_model import recipe
from workflow_inputs import NAMES as SVD_NAMES
from workflow_inputs import small

#: In each mode of memory; the other workflows in the two common ones.
EVERYWHERE = ("quickstart", "exvideo_low_memory", "exvideo_second_pass")
NAMES = set(SVD_NAMES) | {"tiles", "windows", "untrained"}
OTHERS = tuple(sorted(NAMES - set(EVERYWHERE) - {"exvideo_quickstart"}))

Expected = Callable[[str, Prompt], np.ndarray]


def graph_of(name: str) -> Prompt:
    if name in NAMES and name.startswith("exvideo_"):
        graph = clips.lossless(small(name))
        if name == "exvideo_animatelcm":  # a simulated card has no random numbers, which lcm needs
            graph[find(graph, "KSamplerSelect")]["inputs"]["sampler_name"] = "euler"
        return graph
    graph = quick()
    sampled = next(node["inputs"] for node in graph.values() if node["class_type"] == "KSampler")
    if name == "tiles":
        tiles = {"model": sampled["model"], "tile_width": 128, "tile_height": 128, "overlap": 64}
        graph["tiles"] = {"class_type": "ExVideoTiles", "inputs": tiles}
        sampled["model"] = ["tiles", 0]
        graph[find(graph, "ExVideoConditioning")]["inputs"].update(width=192, height=192)
    if name == "windows":
        windows = {"window_frames": 5, "overlap_frames": 2, "fuse": "pyramid", "freenoise": True}
        graph["windows"] = {"class_type": "ExVideoWindows", "inputs": {"model": sampled["model"], **windows}}
        sampled["model"] = ["windows", 0]
    if name == "untrained":
        made = {"model": [find(graph, "ExVideoCheckpointLoader"), 0], "frames": 16}
        graph["init"] = {"class_type": "ExVideoInit", "inputs": made}
        saved = {"extension": ["init", 0], "filename_prefix": "made/new", "dtype": "fp16"}
        graph["file"] = {"class_type": "ExVideoSave", "inputs": saved}
        del graph[find(graph, "ExVideoLoader")]
        graph[find(graph, "ExVideoApply")]["inputs"]["extension"] = ["init", 0]
    return graph


@pytest.mark.parametrize("name", EVERYWHERE)
def test_each_mode_of_memory(server: Server, name: str, expected: Expected, alike: Callable[..., None]) -> None:
    graph = graph_of(name)
    found = clips.frames(server, graph)
    clips.assert_near(found, expected(name, graph), name)
    # ComfyUI's two ways of loading weights may round differently, also without an extension.
    alike(f"{name}, {server.simulation.dynamic}", found)


@pytest.mark.parametrize("mode", ["static", "dynamic"], indirect=True, scope="session")
@pytest.mark.parametrize("name", OTHERS)
def test_every_other_workflow(server: Server, name: str, expected: Expected) -> None:
    graph = graph_of(name)
    clips.assert_near(clips.frames(server, graph), expected(name, graph), name)


@pytest.mark.parametrize("mode", ["static", "dynamic"], indirect=True, scope="session")
@pytest.mark.parametrize("name", other_models.TEXT_WIDTHS)
def test_workflows_of_other_models(server: Server, cpu: Server, name: str) -> None:
    found, expected = (other_models.latent(each, name) for each in (server, cpu))
    without = other_models.latent(server, name, strength=0.0)
    # The card computes in half precision.
    assert (found - expected).norm() < 0.05 * expected.norm()
    assert (without - expected).norm() > 0.2 * expected.norm()


def test_the_tests_run_every_node(server: Server) -> None:
    graphs = [graph_of(name) for name in (*EVERYWHERE, *OTHERS)]
    graphs += [other_models.small(name) for name in other_models.TEXT_WIDTHS]
    ours = {name for name in server.get("/object_info") if name.startswith("ExVideo")}
    assert ours == {
        node["class_type"] for graph in graphs for node in graph.values() if node["class_type"].startswith("ExVideo")
    }


def test_the_modes_are_what_they_are_called(server: Server, mode: str) -> None:
    """That weights were refused, evicted, kept or streamed as each mode has it, while a clip was sampled."""
    clips.frames(server, quick())
    records = trace.read(server.log())
    (unet,) = [record for record in records if record.get("models") == ["SVD_img2vid"]][-1:]
    size = recipe.EXTENSION.stat().st_size
    resident = unet["loaded"][0]
    if mode == "static":
        assert resident > size
    elif mode == "novram":
        assert resident < 0.1 * size
    elif mode == "lowvram":
        assert 0.1 * size < resident < size
    if not server.simulation.dynamic:
        assert records[-1]["dynamic"] == []
        return
    memory = records[-1]["dynamic"][0]
    assert memory["faults"] > 300
    assert not any(vbar["pins"] for vbar in memory["vbars"])
    if mode == "pressure":
        assert memory["refusals"] > 20 and memory["evictions"] > 20
        assert memory["misses"] > memory["refusals"]
        assert memory["faults"] > memory["misses"]
    else:
        assert memory["refusals"] == 0


def test_offloaded_skips_leave_the_card_and_come_back(server: Server) -> None:
    def copied(seed: int, offload: bool) -> list[int]:
        """Bytes to RAM and back while a clip is sampled."""
        sampler["seed"], memory["offload_skips"] = seed, offload
        clips.frames(server, clips.lossless(graph))
        records = [record for record in trace.read(server.log()) if record.get("node") == "KSampler"]
        begin, end = (record["cards"][0] for record in records[-2:])
        return [end[way] - begin[way] for way in ("to_host", "to_card")]

    graph = small("exvideo_low_memory")
    memory, sampler = graph[find(graph, "ExVideoMemory")]["inputs"], graph[find(graph, "KSampler")]["inputs"]
    copied(0, False)  # the first run also moves models
    kept, away = copied(1, False), copied(2, True)
    assert all(more - less > 2**20 for more, less in zip(away, kept, strict=True)), (kept, away)
