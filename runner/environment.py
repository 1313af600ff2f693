"""Makes Python environments in the user's cache folder, keyed by what they hold. Standard library only."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
import venv
from pathlib import Path

from .hosts import PACK, Host

#: What environments are made with. EXVIDEO_TORCH names others: "torch==2.8.0 torchvision==0.23.0 torchaudio==2.8.0".
_TORCH = os.environ.get("EXVIDEO_TORCH", "").split() or ["torch==2.14.1", "torchvision==0.29.1"]
_ORACLE = ["--no-deps", "diffsynth==1.1.9"]
_LOCK_SECONDS = 3600
_FRONTEND = "comfyui-frontend-package"
#: Prints the versions of the packages that it is given, as JSON.
_VERSIONS = """
import importlib.metadata as metadata, json, sys
found = {}
for name in sys.argv[1:]:
    try:
        found[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
        pass
print(json.dumps(found))
"""


class UnfitEnvironment(Exception):
    """The environments that lie with a ComfyUI are made for another one: the message says how, and what to do."""


def cache_folder() -> Path:
    if "EXVIDEO_CACHE" in os.environ:
        return Path(os.environ["EXVIDEO_CACHE"])
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home())) / "exvideo-comfyui"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "exvideo-comfyui"
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "exvideo-comfyui"


def own_python() -> Path:
    """A Python for all that needs no ComfyUI: tests, post-tuning, benchmarks, the demo without it."""
    text = (PACK / "runner" / "requirements.txt").read_text(encoding="utf-8")
    packages = [line for line in text.split("\n") if line and _package(line) != "torch"]
    return _environment("standalone", [[*packages, _TORCH[0]], _ORACLE], text)


def host_python(host: Host) -> Path:
    """A Python that can run a ComfyUI: that of an environment which lies with it, else one of the cache folder's.

    Raises:
        UnfitEnvironment: see `found_python`.
    """
    found = found_python(host)
    if found is not None:
        return found
    others = [line for line in host.requirements if _package(line) not in ("torch", "torchvision", "torchaudio")]
    audio = next((line for line in _TORCH if _package(line) == "torchaudio"), "torchaudio")
    # requests: ComfyUI 0.3.64 imports it and counts on transformers to bring it, which version 5 no longer does.
    tools = ["requests", "pytest", "playwright", "comfyui-manager==4.2.2"]
    steps = [_TORCH, ["--no-deps", audio], [*others, *_TORCH, *tools], _ORACLE]
    return _environment(f"comfyui-{host.version}", steps, "\n".join(others))


def found_python(host: Host) -> Path | None:
    """The first Python that lies with a ComfyUI and has the packages it pins; None where none lies there at all.

    ComfyUI starts with other versions of them, or ends in a traceback: its templates, for one, have changed their
    layout. A frontend may be newer than the pinned one, as users update it by itself.

    Raises:
        UnfitEnvironment: there are environments, and none fits.
    """
    unfit = []
    for python in host.pythons:
        wrong = _mismatches(python, host.pins)
        if not wrong:
            return python
        unfit.append((python, wrong))
    if not unfit:
        return None
    python, wrong = unfit[0]
    needed = host.path / "requirements.txt"
    if host.path in python.parents or python.parent.name == "python_embeded":
        remedy = f'"{python}" -m pip install -r "{needed}"'
    else:  # it may serve another ComfyUI: left as it is
        own = host.path / "venv"
        install = f'"{own / python.relative_to(python.parents[1])}" -m pip install -r "{needed}" pytest'
        remedy = f'"{sys.executable}" -m venv "{own}" && {install}'
    raise UnfitEnvironment(f"{python} does not match its requirements.txt ({'; '.join(wrong)}). To run it: {remedy}")


def _mismatches(python: Path, pins: dict[str, str]) -> list[str]:
    """Which pinned packages an environment has in another version, or not at all."""
    command = [python, "-I", "-c", _VERSIONS, *pins]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):  # as where the Python that it was made with is gone
        return ["it does not start"]
    found = json.loads(done.stdout)
    return [
        f"{name} {wanted} required, {found.get(name, 'none')} installed"
        for name, wanted in pins.items()
        if not (found.get(name) == wanted or (name == _FRONTEND and _numbers(found.get(name, "")) > _numbers(wanted)))
    ]


def _package(requirement: str) -> str:
    """The name in a line of a requirements.txt."""
    return re.split(r"[<>=~! \[]", requirement)[0]


def _numbers(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version)]


def _environment(name: str, steps: list[list[str]], key: str) -> Path:
    """Make the environment if it is not there: `steps` are arguments of `pip install`, in order."""
    digest = hashlib.sha256(repr((steps[1:], key, _TORCH, sys.version_info[:2])).encode()).hexdigest()[:12]
    folder = cache_folder() / f"{name}-{digest}"
    ready = folder / ".ready"
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    if ready.exists():
        return python
    lock = folder.with_name(f"{folder.name}.lock")
    _acquire(lock)
    try:
        if not ready.exists():
            print(f"Making an environment for {name} in {folder} (once; takes some minutes) ...", flush=True)
            shutil.rmtree(folder, ignore_errors=True)
            venv.create(folder, with_pip=True, symlinks=sys.platform != "win32")
            for step in steps:
                shown = " ".join(step) if len(step) < 5 else f"{len(step)} packages"
                print(f"  pip install {shown}", flush=True)
                subprocess.run([python, "-m", "pip", "install", "--quiet", *step], check=True)
            ready.touch()
    finally:
        lock.unlink(missing_ok=True)
    return python


def _acquire(lock: Path) -> None:
    """Wait while another run makes the same environment; a lock left over for an hour counts as abandoned."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    told = False
    while True:
        try:
            os.close(os.open(lock, os.O_CREAT | os.O_EXCL))
            return
        except FileExistsError:
            if not told:
                print(f"Another run makes this environment; waiting (if none does, remove {lock}) ...", flush=True)
                told = True
            with contextlib.suppress(FileNotFoundError):  # the other run may end just now
                if time.time() - lock.stat().st_mtime > _LOCK_SECONDS:
                    lock.unlink()
            time.sleep(2)
