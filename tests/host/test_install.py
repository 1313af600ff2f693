"""Into a real ComfyUI by ComfyUI-Manager's own code and out again; and what the pack costs at start-up."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from runner.hosts import PACK, Host
from runner.server import Server

INTERFACE = Path("tests", "host", "node_interface.json")
# cm-cli knows no other folder than the ComfyUI's own: the host is told of another before cm-cli asks it.
CM_CLI = """
import os, runpy, sys
host, base = sys.argv.pop(1), sys.argv.pop(1)
sys.path.insert(0, host)
import comfy.options
comfy.options.enable_args_parsing()
arguments, sys.argv = sys.argv[1:], ["main.py", "--base-directory", base]
import folder_paths
if not hasattr(folder_paths, "get_system_user_directory"):  # 0.3.64 is older than this form of the Manager
    folder_paths.get_system_user_directory = lambda name: os.path.join(base, "user", "__" + name)
sys.argv = ["cm-cli", *arguments]
runpy.run_module("cm_cli", run_name="__main__", alter_sys=True)
"""
# Writes the name of every module that the pack makes the host look for, and takes half a second to register.
PROBE = """
import asyncio, sys
from comfy_api.latest import ComfyExtension

class Nothing(ComfyExtension):
    async def get_node_list(self):
        return []

async def comfy_entrypoint():
    await asyncio.sleep(0.5)
    return Nothing()
"""
PROBE_PRESTARTUP = """
import os, sys

class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        frame = sys._getframe(1)
        while frame is not None and os.path.join("custom_nodes", {pack!r}, "") not in frame.f_code.co_filename:
            frame = frame.f_back
        if frame is not None:
            print("the pack imports:", name, flush=True)

sys.meta_path.insert(0, Finder)
"""


@pytest.fixture
def server(host_path):
    """One that may start several times, over the same folder."""
    server = Server(Host(host_path), keep=True)
    yield server
    shutil.rmtree(server.base)


@pytest.fixture
def address(tmp_path, monkeypatch) -> str:
    """The pack's public address, at which git finds the last commit of this checkout."""
    if not (PACK / ".git").exists() or shutil.which("git") is None:
        pytest.skip("git can clone no pack here: the pack is no git checkout (a download?), or there is no git")
    subprocess.run(["git", "clone", "-q", "--depth", "1", PACK.as_uri(), tmp_path / "pack"], check=True)
    project = (PACK / "pyproject.toml").read_text(encoding="utf-8")
    (found,) = re.findall(r'^Repository = "(.+)"', project, re.MULTILINE)
    monkeypatch.setenv("GIT_CONFIG_COUNT", "1")
    monkeypatch.setenv("GIT_CONFIG_KEY_0", f"url.{(tmp_path / 'pack').as_uri()}.insteadOf")
    monkeypatch.setenv("GIT_CONFIG_VALUE_0", found)
    return found


def manage(server: Server, *arguments: str) -> str:
    """cm-cli on a server's folder. No network, and no package installed: the pack must need none."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"COMFYUI_PATH": str(server.host.path), "COMFYUI_FOLDERS_BASE_PATH": str(server.base)}
    environment |= {"PIP_NO_INDEX": "1", "UV_OFFLINE": "1"}
    command = [sys.executable, "-c", CM_CLI, str(server.host.path), str(server.base), *arguments, "--mode", "local"]
    done = subprocess.run(command, cwd=server.base, env=environment, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def start(server: Server) -> dict:
    """Start and stop a server: the pack's nodes that it had."""
    with server:
        nodes = {key: node for key, node in server.get("/object_info").items() if key.startswith("ExVideo")}
    assert "IMPORT FAILED" not in server.log() and "Traceback" not in server.log(), server.log()
    return nodes


def promised(pack: Path) -> set[str]:
    return set(json.loads((pack / INTERFACE).read_text(encoding="utf-8")))


def files(server: Server) -> set[Path]:
    manager = server.base / "user" / "__manager"
    return {path for path in server.base.rglob("*") if path != manager and manager not in path.parents}


@pytest.mark.skipif(
    importlib.util.find_spec("comfyui_manager") is None,
    reason=f"ComfyUI-Manager is missing; to run this: {sys.executable} -m pip install comfyui-manager",
)
def test_the_manager_installs_it_and_uninstalls_it_without_a_trace(server, address) -> None:
    (server.base / "custom_nodes" / PACK.name).unlink()
    config = server.base / "user" / "__manager" / "config.ini"
    config.parent.mkdir()
    config.write_text("[default]\nnetwork_mode = offline\nuse_uv = false\n", encoding="utf-8")
    assert start(server) == {}
    before = files(server)

    told = manage(server, "install", address, "--exit-on-fail")
    assert "[INSTALLED]" in told and "failed" not in told, told
    installed = server.base / "custom_nodes" / address.rsplit("/", 1)[1]
    commits = [
        subprocess.run(["git", "-C", path, "rev-parse", "HEAD"], check=True, capture_output=True).stdout
        for path in (installed, PACK)
    ]
    assert commits[0] == commits[1]
    nodes = start(server)
    assert set(nodes) == promised(installed)
    assert "exvideo_small_128f.safetensors" in json.dumps(nodes["ExVideoLoader"])

    assert "[UNINSTALLED]" in manage(server, "uninstall", installed.name)
    assert files(server) == before
    assert start(server) == {}
    assert files(server) == before


def test_it_starts_at_once_and_imports_nothing_the_host_has_not(server) -> None:
    probe = server.base / "custom_nodes" / "probe"
    probe.mkdir()
    (probe / "__init__.py").write_text(PROBE, encoding="utf-8")
    (probe / "prestartup_script.py").write_text(PROBE_PRESTARTUP.format(pack=PACK.name), encoding="utf-8")
    assert set(start(server)) == promised(PACK)
    imported = re.findall(r"the pack imports: (.+)", server.log())
    own = [name for name in imported if f"custom_nodes{os.sep}{PACK.name}" in name]
    assert len(own) > len(list((PACK / "nodes").glob("*.py")))
    assert {name.split(".")[0] for name in imported if name not in own} <= sys.stdlib_module_names
    seconds = {Path(path).name: float(time) for time, path in re.findall(r"([\d.]+) seconds: (.+)", server.log())}
    print(f"{seconds[PACK.name]} s, beside the standard library {sorted(set(imported) - set(own))}")
    assert seconds["probe"] >= 0.5  # the figures hold what comfy_entrypoint takes
    assert seconds[PACK.name] < seconds["probe"]
