"""Folders and files of any name, names that lead out of their folder, and two clients at once."""

from __future__ import annotations

import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import av
import pytest

from runner.hosts import Host
from runner.server import Prompt, Server
from small_model import recipe

ODD = "fünf Ordner, 目录 & ein Leerzeichen"


@pytest.fixture(scope="module")
def server(host_path):
    server = Server(Host(host_path), prefix=f"{ODD}-")
    elsewhere = server.base / "auf der zweiten Platte 磁盘"
    (elsewhere / "unter ordner").mkdir(parents=True)
    shutil.copy(recipe.EXTENSION, elsewhere / "unter ordner" / "扩展 für 128.safetensors")
    # A folder that is a link, in it a file that is one.
    (server.models / "exvideo" / "verlinkt").symlink_to(elsewhere, target_is_directory=True)
    (elsewhere / "link.safetensors").symlink_to(recipe.EXTENSION)
    (server.models / "checkpoints" / "kleines Modell 小.safetensors").symlink_to(recipe.CHECKPOINT)
    (server.base / "outside.safetensors").symlink_to(recipe.EXTENSION)
    with server:
        yield server


def prompt(frames: int = 8, steps: int = 1, seed: int = 0, **changes: dict) -> Prompt:
    graph = {
        "1": {"class_type": "ExVideoCheckpointLoader", "inputs": {"ckpt_name": "kleines Modell 小.safetensors"}},
        "2": {"class_type": "ExVideoLoader", "inputs": {"extension_name": "verlinkt/link.safetensors"}},
        "3": {"class_type": "ExVideoApply", "inputs": {
            "model": ["1", 0], "extension": ["2", 0], "strength": 1.0, "positions": "trained"}},
        "4": {"class_type": "ExVideoExamplePicture", "inputs": {"seed": 10_000_000}},
        "5": {"class_type": "ExVideoConditioning", "inputs": {
            "clip_vision": ["1", 1], "vae": ["1", 2], "image": ["4", 0], "width": 64, "height": 64, "frames": frames,
            "fps": 30, "motion_bucket_id": ["4", 1], "noise_aug_strength": 0.02, "seed": seed}},
        "6": {"class_type": "KSampler", "inputs": {
            "model": ["3", 0], "positive": ["5", 0], "negative": ["5", 1], "latent_image": ["5", 2], "seed": 0,
            "steps": steps, "cfg": 1.0, "sampler_name": "euler", "scheduler": "karras", "denoise": 1.0}},
        "7": {"class_type": "ExVideoSaveVideo", "inputs": {
            "vae": ["1", 2], "latent": ["6", 0], "chunk_frames": 8, "overlap_frames": 2, "fps": 30, "codec": "h264",
            "quality": 17, "filename_prefix": "clip"}},
    }  # fmt: skip
    for key, inputs in changes.items():
        graph[key.removeprefix("n")]["inputs"].update(inputs)
    return graph


def length(server: Server, result) -> int:
    """Frames of the file that a prompt has made."""
    assert result.status == "success", result.error
    (entry,) = result.outputs["7"]["images"]
    with av.open(str(server.output / entry["subfolder"] / entry["filename"])) as container:
        return sum(1 for _ in container.decode(video=0))


@pytest.mark.parametrize("name", ["verlinkt/link.safetensors", "verlinkt/unter ordner/扩展 für 128.safetensors"])
def test_names_of_every_kind_load_and_save(server, name: str) -> None:
    assert ODD in str(server.base)
    graph = prompt(n2={"extension_name": name}, n7={"filename_prefix": f"视频 für mich/{ODD}"})
    graph["8"] = {"class_type": "ExVideoSave", "inputs": {
        "extension": ["2", 0], "filename_prefix": "erweiterung 扩展/mein", "dtype": "fp16"}}  # fmt: skip
    result = server.run(graph)
    assert length(server, result) == 8
    assert result.outputs["7"]["images"][0]["subfolder"] == "视频 für mich"
    (saved,) = result.outputs["8"]["extensions"]
    path = server.output / saved["subfolder"] / saved["filename"]
    assert path.parent.name == "erweiterung 扩展" and path.read_bytes()[8:9] == b"{"


@pytest.mark.parametrize(
    "name", ["../../outside.safetensors", "verlinkt/../../../outside.safetensors", "{base}/outside.safetensors"]
)
def test_a_name_that_leads_out_of_the_models_is_refused(server, name: str) -> None:
    result = server.run(prompt(seed=1, n2={"extension_name": name.format(base=server.base)}))
    assert result.status in ("invalid", "error")  # before the run, or by the loader in older hosts
    assert result.status == "invalid" or result.error["node_type"] == "ExVideoLoader"


@pytest.mark.parametrize("prefix", ["../outside", "a/../../outside", "{base}/outside"])
@pytest.mark.parametrize("kind", ["ExVideoSaveVideo", "ExVideoSave"])
def test_nothing_is_written_outside_the_output_folder(server, kind: str, prefix: str) -> None:
    prefix = prefix.format(base=server.base)
    before = sorted(server.base.rglob("outside*"))
    graph = prompt(seed=2, n7={"filename_prefix": prefix})
    if kind == "ExVideoSave":
        graph = {"2": graph["2"], "8": {"class_type": kind, "inputs": {
            "extension": ["2", 0], "filename_prefix": prefix, "dtype": "fp16"}}}  # fmt: skip
    result = server.run(graph)
    assert result.status == "error" and result.error["node_type"] == kind
    assert "outside the output folder" in result.error["exception_message"]
    assert sorted(server.base.rglob("outside*")) == before


def test_two_clients_at_once_get_each_their_own(server) -> None:
    """One is cancelled while the other waits: that one is not touched."""
    cancelling: list[threading.Thread] = []
    ids: list[str] = []

    def cancel(node: str, step: int, steps: int) -> None:
        if not cancelling:
            cancelling.append(threading.Thread(target=server.interrupt, args=ids))
            cancelling[0].start()

    with ThreadPoolExecutor(4) as clients:
        lengths = (6, 9, 12)
        good = [clients.submit(server.run, prompt(frames, seed=10 + frames)) for frames in lengths]
        stopped = clients.submit(server.run, prompt(40, 30, seed=3), cancel, on_queued=ids.append)
        assert stopped.result().status == "interrupted"
        assert [length(server, run.result()) for run in good] == list(lengths)
    cancelling[0].join()
