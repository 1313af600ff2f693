"""What `bench cards` takes for the defaults is what users get."""

from __future__ import annotations

from benchmarks import stages
from exvideo_core.comfyui.low_memory.estimate import MemorySettings
from runner import help_pages


def _defaults(node_id: str) -> dict[str, object]:
    nodes = {node.define_schema().node_id: node for node in help_pages.load_nodes()}
    return {item.id: getattr(item, "default", None) for item in nodes[node_id].define_schema().inputs}


def test_the_first_settings_are_the_nodes_defaults() -> None:
    for node in ("ExVideoDecode", "ExVideoSaveVideo"):
        found = _defaults(node)
        first = stages.DECODING[0]
        assert (first.chunk_frames, first.overlap_frames) == (found["chunk_frames"], found["overlap_frames"])
        assert found["blend"] == "smooth"
    first = stages.SAMPLING[0]
    assert MemorySettings(first.chunk_megabytes, first.offload_skips) == MemorySettings()
    assert not first.tile
    found = _defaults("ExVideoConditioning")
    assert (found["fps"], found["motion_bucket_id"], found["noise_aug_strength"]) == (30, 127, 0.02)
