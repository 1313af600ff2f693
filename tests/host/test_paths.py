"""Folders and files of any name, names that lead out of their folder, and two clients at once."""

from __future__ import annotations

import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import av
import pytest

from runner.hosts import Host
from runner.prompts import quick, to_file
from runner.server import Prompt, Server
from small_model import recipe

ODD = "fünf Ordner, 目录 & ein Leerzeichen"
CHECKPOINT = "kleines Modell 小.safetensors"
SAVE = "9"  # the node of the quickstart that becomes ExVideoSaveVideo


@pytest.fixture(scope="module")
def server(host_path):
    server = Server(Host(host_path), prefix=f"{ODD}-")
    elsewhere = server.base / "auf der zweiten Platte 磁盘"
    (elsewhere / "unter ordner").mkdir(parents=True)
    shutil.copy(recipe.EXTENSION, elsewhere / "unter ordner" / "扩展 für 128.safetensors")
    # A folder that is a link, in it a file that is one.
    (server.models / "exvideo" / "verlinkt").symlink_to(elsewhere, target_is_directory=True)
    (elsewhere / "link.safetensors").symlink_to(recipe.EXTENSION)
    (server.models / "checkpoints" / CHECKPOINT).symlink_to(recipe.CHECKPOINT)
    (server.base / "outside.safetensors").symlink_to(recipe.EXTENSION)
    with server:
        yield server


def prompt(frames: int = 8, steps: int = 1, extension: str = "verlinkt/link.safetensors", **saved: object) -> Prompt:
    """A clip of the linked models into a file."""
    names = {"ExVideoCheckpointLoader": {"ckpt_name": CHECKPOINT}, "ExVideoLoader": {"extension_name": extension}}
    return to_file(quick(frames, steps, **names), **saved)


def length(server: Server, result) -> int:
    """Frames of the file that a prompt has made."""
    assert result.status == "success", result.error
    (entry,) = result.outputs[SAVE]["images"]
    with av.open(str(server.output / entry["subfolder"] / entry["filename"])) as container:
        return sum(1 for _ in container.decode(video=0))


@pytest.mark.parametrize("name", ["verlinkt/link.safetensors", "verlinkt/unter ordner/扩展 für 128.safetensors"])
def test_names_of_every_kind_load_and_save(server, name: str) -> None:
    assert ODD in str(server.base)
    graph = prompt(extension=name, filename_prefix=f"视频 für mich/{ODD}")
    graph["write"] = {"class_type": "ExVideoSave", "inputs": {
        "extension": ["2", 0], "filename_prefix": "erweiterung 扩展/mein", "dtype": "fp16"}}  # fmt: skip
    result = server.run(graph)
    assert length(server, result) == 8
    assert result.outputs[SAVE]["images"][0]["subfolder"] == "视频 für mich"
    (saved,) = result.outputs["write"]["extensions"]
    path = server.output / saved["subfolder"] / saved["filename"]
    assert path.parent.name == "erweiterung 扩展" and path.read_bytes()[8:9] == b"{"


@pytest.mark.parametrize(
    "name", ["../../outside.safetensors", "verlinkt/../../../outside.safetensors", "{base}/outside.safetensors"]
)
def test_a_name_that_leads_out_of_the_models_is_refused(server, name: str) -> None:
    result = server.run(prompt(extension=name.format(base=server.base)))
    assert result.status in ("invalid", "error")  # before the run, or by the loader in older hosts
    assert result.status == "invalid" or result.error["node_type"] == "ExVideoLoader"


@pytest.mark.parametrize("prefix", ["../outside", "a/../../outside", "{base}/outside"])
@pytest.mark.parametrize("kind", ["ExVideoSaveVideo", "ExVideoSave"])
def test_nothing_is_written_outside_the_output_folder(server, kind: str, prefix: str) -> None:
    prefix = prefix.format(base=server.base)
    before = sorted(server.base.rglob("outside*"))
    graph = prompt(filename_prefix=prefix)
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
        good = [clients.submit(server.run, prompt(frames)) for frames in lengths]
        stopped = clients.submit(server.run, prompt(40, 30), cancel, on_queued=ids.append)
        assert stopped.result().status == "interrupted"
        assert [length(server, run.result()) for run in good] == list(lengths)
    cancelling[0].join()
