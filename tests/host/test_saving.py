"""What the saving nodes take and write, and what they say where they cannot: through a real server."""

from __future__ import annotations

import errno
import os
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from exvideo_core.choices import CODECS
from exvideo_core.files.output_file import OutputFileError
from exvideo_core.video.writer import VideoWriter
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
    assert result.status == "invalid" and f"fps ({value}) must be between 1 and 240." in str(result.error)
    if value in ("thirty", float("inf")):  # nothing that gives numbers by link gives these
        return
    result = server.run(video(["4", 0], **{"4": {"class_type": "PrimitiveFloat", "inputs": {"value": value}}}))
    assert result.status == "error"
    assert result.error["exception_message"].startswith(f"fps ({value}) must be between 1 and 240.")


def extension(prefix: str) -> dict[str, dict[str, Any]]:
    """A new extension of the small model into a file."""
    return {
        "1": {"class_type": "ExVideoCheckpointLoader", "inputs": {"ckpt_name": recipe.CHECKPOINT.name}},
        "2": {"class_type": "ExVideoInit", "inputs": {"model": ["1", 0], "frames": 30}},
        "3": {"class_type": "ExVideoSave",
              "inputs": {"extension": ["2", 0], "filename_prefix": prefix, "dtype": "fp16"}},
    }  # fmt: skip


def refused(server: Server, graph: dict[str, dict[str, Any]], path: Path, problem: str) -> None:
    """A prompt fails on the saving node and leaves nothing behind; the next one works."""
    before = set(server.output.rglob("*"))
    result = server.run(graph)
    assert result.status == "error" and result.error["node_id"] == "3"
    assert result.error["exception_message"].startswith(f"'{path}' cannot be written: {problem}")
    assert set(server.output.rglob("*")) == before
    assert server.run(video(prefix="next")).status == "success"


@pytest.mark.parametrize(("make", "suffix"), [(video, ".mp4"), (extension, ".safetensors")])
def test_a_name_that_is_taken_is_told_and_the_server_goes_on(server, make, suffix) -> None:
    (server.output / "taken").write_text("a file")
    refused(server, make(prefix="taken/new"), server.output / "taken" / "new", "a folder has this name, or a file")
    folder = server.output / f"under{suffix}"
    (folder / f".new_00001_.part{suffix}").mkdir(parents=True)
    refused(server, make(prefix=f"{folder.name}/new"), folder / f"new_00001_{suffix}", "a folder has this name")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full, which is always full, is Linux' own")
def test_a_full_disk_is_told_and_the_server_goes_on(server) -> None:
    folder = server.output / "full"
    folder.mkdir()
    (folder / ".new_00001_.part.mp4").symlink_to("/dev/full")
    result = server.run(video(prefix="full/new"))
    assert result.status == "error" and result.error["node_id"] == "3"
    path = folder / "new_00001_.mp4"
    assert result.error["exception_message"].startswith(f"'{path}' cannot be written: the disk is full. Free up some")
    assert list(folder.iterdir()) == []
    assert rate(server, server.run(video(prefix="full/new"))) == 30


@pytest.fixture
def clip() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3), dtype=np.uint8)


@pytest.mark.parametrize("codec", CODECS)
def test_a_disk_that_takes_no_more_leaves_no_part_of_a_video(tmp_path: Path, clip: np.ndarray, codec: str) -> None:
    """The system itself refuses to let the file grow: while frames are added, and while the file is closed."""
    resource = pytest.importorskip("resource")
    path = tmp_path / f"clip{CODECS[codec].suffix}"
    with VideoWriter(path, 30, codec) as writer:
        writer.add(clip)
    size = path.stat().st_size
    path.write_bytes(b"of an earlier run")
    _, most = limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (0, size // 2, size * 9 // 10):
        try:
            with (
                pytest.raises(OutputFileError, match=rf"clip\{path.suffix}' cannot be written: the file is too large"),
                VideoWriter(path, 30, codec) as writer,
            ):
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, most))
                writer.add(clip)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert list(tmp_path.iterdir()) == [path] and path.read_bytes() == b"of an earlier run"


def test_what_ends_a_video_is_told_and_not_what_follows_from_it(tmp_path: Path, clip: np.ndarray) -> None:
    """A run is cancelled while the disk is full: that it was cancelled is what counts."""
    if not Path("/dev/full").exists():
        pytest.skip("/dev/full, which is always full, is Linux' own")
    (tmp_path / ".clip.part.mkv").symlink_to("/dev/full")
    with (
        pytest.raises(RuntimeError, match="cancelled"),
        VideoWriter(tmp_path / "clip.mkv", 30, "ffv1 (lossless)") as writer,
    ):
        writer.add(clip[:1])
        raise RuntimeError("cancelled")
    assert list(tmp_path.iterdir()) == []


def test_a_video_that_another_program_holds_open_is_left_to_it(tmp_path: Path, clip: np.ndarray, monkeypatch) -> None:
    """As Windows does it."""
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"played")

    def replace(*paths: object) -> None:
        raise PermissionError(errno.EACCES, "Access is denied")

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OutputFileError, match="clip.mp4' .* open in another program"), VideoWriter(path, 30) as writer:
        writer.add(clip)
    assert list(tmp_path.iterdir()) == [path] and path.read_bytes() == b"played"


def test_a_folder_that_may_not_be_written_to_is_known_before_anything_is_decoded(tmp_path: Path, monkeypatch) -> None:
    def refuse(path: Path, *arguments: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refuse)
    reached = False
    with (
        pytest.raises(OutputFileError, match="permission to write to its folder is denied"),
        VideoWriter(tmp_path / "a.mp4", 30),
    ):
        reached = True
    assert not reached
