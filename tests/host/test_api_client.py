"""The example client of docs/, as a program of its own, against a real server."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from runner.hosts import PACK, Host
from runner.server import Server
from small_model import recipe

QUICK = [
    "--set", f"ExVideoCheckpointLoader.ckpt_name={recipe.CHECKPOINT.name}",
    "--set", f"ExVideoLoader.extension_name={recipe.EXTENSION.name}",
    "--set", "ExVideoConditioning.width=64", "--set", "ExVideoConditioning.height=64",
    "--set", "ExVideoConditioning.frames=8", "--set", "KSampler.steps=2",
]  # fmt: skip


@pytest.fixture(scope="module")
def server(host_path):
    with Server(Host(host_path)) as server:
        yield server


def command(server: Server, *arguments: str | Path) -> list[str]:
    workflow = PACK / "workflows" / "api" / "exvideo_image_to_video.json"
    return [sys.executable, str(PACK / "docs" / "api_client.py"), str(workflow), "--server", server.url,
            *QUICK, *map(str, arguments)]  # fmt: skip


def test_it_uploads_runs_and_fetches(server, tmp_path: Path) -> None:
    picture = tmp_path / "my picture ü.png"
    Image.new("RGB", (80, 60), "orange").save(picture)
    arguments = command(server, "--image", picture, "--to", tmp_path / "made")
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    (path,) = (Path(line) for line in done.stdout.splitlines())
    assert path.parent == tmp_path / "made" and path.suffix == ".mp4" and path.stat().st_size > 500
    assert "KSampler: 2/2" in done.stderr


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("ExVideoConditioning.frames=130", "KSampler (node 7): The video has 130 frames"),
        ("ExVideoDecode.overlap_frames=99", "overlap_frames (99)"),
        ("ExVideoWindows.frames=1", "No node of this workflow is called ExVideoWindows"),
    ],
)
def test_what_is_wrong_is_said(server, tmp_path: Path, setting: str, message: str) -> None:
    picture = tmp_path / "picture.png"
    Image.new("RGB", (64, 64)).save(picture)
    arguments = command(server, "--image", picture, "--set", setting, "--to", tmp_path)
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr
    assert done.stdout == ""


def test_a_run_deleted_from_the_queue_is_not_waited_for(server, tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    Image.new("RGB", (64, 64)).save(picture)
    long = command(server, "--image", picture, "--set", "KSampler.steps=2000", "--to", tmp_path)
    first = subprocess.Popen(long, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while not server.get("/queue")["queue_running"] and time.monotonic() < deadline:
            time.sleep(0.1)
        second = subprocess.Popen(long, stderr=subprocess.PIPE, text=True)
        while not (pending := server.get("/queue")["queue_pending"]) and time.monotonic() < deadline:
            time.sleep(0.1)
        server.post("/queue", {"delete": [pending[0][1]]})
        _, said = second.communicate(timeout=30)
        assert second.returncode == 1 and "deleted from the queue" in said
    finally:
        first.kill()
        first.wait()
        server.interrupt()


def test_ctrl_c_cancels_the_run_on_the_server(server, tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    Image.new("RGB", (64, 64)).save(picture)
    arguments = command(server, "--image", picture, "--set", "KSampler.steps=2000", "--to", tmp_path)
    # A background job's children ignore the signal, unless told otherwise.
    client = subprocess.Popen(
        arguments, stderr=subprocess.PIPE, text=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    )
    assert client.stderr is not None
    while "KSampler" not in client.stderr.read(1) + client.stderr.read(8):
        pass
    client.send_signal(signal.SIGINT)
    assert client.wait(30) == 130
    deadline = time.monotonic() + 30
    while server.get("/queue")["queue_running"] and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not server.get("/queue")["queue_running"] and not server.get("/queue")["queue_pending"]
    (entry,) = server.get("/history?max_items=1").values()
    assert entry["status"]["status_str"] == "error"
