"""What the saving nodes take and write, through a real server."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import av
import pytest

from runner.hosts import Host
from runner.server import Result, Server
from small_model import recipe


@pytest.fixture(scope="module")
def server(host_path):
    with Server(Host(host_path)) as server:
        yield server


def video(fps: Any = 30, prefix: str = "clip", **nodes: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Four grey frames through the small model's decoder into a file."""
    return {
        "1": {"class_type": "ExVideoCheckpointLoader", "inputs": {"ckpt_name": recipe.CHECKPOINT.name}},
        "2": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 4}},
        "3": {"class_type": "ExVideoSaveVideo",
              "inputs": {"vae": ["1", 2], "latent": ["2", 0], "chunk_frames": 4, "overlap_frames": 1, "fps": fps,
                         "codec": "h264", "quality": 17, "filename_prefix": prefix}},
        **nodes,
    }  # fmt: skip


def rate(server: Server, result: Result) -> Fraction:
    """Frames per second of the file that a prompt has made."""
    assert result.status == "success", result.error
    (entry,) = result.outputs["3"]["images"]
    with av.open(str(server.output / entry["subfolder"] / entry["filename"])) as container:
        return container.streams.video[0].average_rate


@pytest.mark.parametrize(
    ("kind", "value", "expected"),
    [
        (None, 30, Fraction(30)),
        (None, 29.97, Fraction(30000, 1001)),
        (None, "23.976", Fraction(24000, 1001)),
        ("PrimitiveInt", 24, Fraction(24)),
        ("PrimitiveFloat", 23.976, Fraction(24000, 1001)),
        ("PrimitiveFloat", 12.5, Fraction(25, 2)),
    ],
)
def test_frame_rates_are_taken_as_they_are_written_or_linked(server, kind, value, expected) -> None:
    if kind is None:
        result = server.run(video(value))
    else:
        result = server.run(video(["4", 0], **{"4": {"class_type": kind, "inputs": {"value": value}}}))
    assert rate(server, result) == expected


@pytest.mark.parametrize("value", [0.5, 240.5, float("nan"), float("inf"), "thirty"])
def test_a_frame_rate_out_of_range_is_refused_by_name(server, value) -> None:
    result = server.run(video(value))
    assert result.status == "invalid" and f"fps ({value}) has to be from 1 to 240." in str(result.error)
    if value in ("thirty", float("inf")):  # nothing that gives numbers by link gives these
        return
    result = server.run(video(["4", 0], **{"4": {"class_type": "PrimitiveFloat", "inputs": {"value": value}}}))
    assert result.status == "error"
    assert result.error["exception_message"].startswith(f"fps ({value}) has to be from 1 to 240.")
