"""Creates Python environments in the user's cache folder, one per set of packages. Standard library only."""

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

#: PyTorch packages. EXVIDEO_TORCH overrides them: "torch==2.8.0 torchvision==0.23.0 torchaudio==2.8.0".
_TORCH = os.environ.get("EXVIDEO_TORCH", "").split() or ["torch==2.14.1", "torchvision==0.29.1"]
_ORACLE = ["--no-deps", "diffsynth==1.1.9"]
_LOCK_SECONDS = 3600
_FRONTEND = "comfyui-frontend-package"
#: A script that prints the versions of the packages in its arguments, as JSON.
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
    """The environments next to a ComfyUI do not match its requirements. The message names mismatch and remedy."""


def cache_folder() -> Path:
    """The pack's cache folder: EXVIDEO_CACHE, or the platform's default."""
    if "EXVIDEO_CACHE" in os.environ:
        return Path(os.environ["EXVIDEO_CACHE"])
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home())) / "exvideo-comfyui"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "exvideo-comfyui"
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "exvideo-comfyui"


def own_python() -> Path:
    """A Python for everything that does not need ComfyUI: tests, post-tuning, benchmarks, the standalone demo."""
    text = (PACK / "runner" / "requirements.txt").read_text(encoding="utf-8")
    packages = [line for line in text.split("\n") if line and _package(line) != "torch"]
    return _environment("standalone", [[*packages, _TORCH[0]], _ORACLE], text)


def host_python(host: Host) -> Path:
    """A Python that can run a ComfyUI: from an environment next to it, or else from the cache folder.

    Raises:
        UnfitEnvironment: see `found_python`.
    """
    found = found_python(host)
    if found is not None:
        return found
    others = [line for line in host.requirements if _package(line) not in ("torch", "torchvision", "torchaudio")]
    audio = next((line for line in _TORCH if _package(line) == "torchaudio"), "torchaudio")
    # ComfyUI 0.3.64 imports requests, which transformers 5 no longer installs.
    tools = ["requests", "pytest", "playwright", "comfyui-manager==4.2.2"]
    steps = [_TORCH, ["--no-deps", audio], [*others, *_TORCH, *tools], _ORACLE]
    return _environment(f"comfyui-{host.version}", steps, "\n".join(others))


def found_python(host: Host) -> Path | None:
    """Find a Python next to a ComfyUI that has the pinned versions of its packages.

    With other versions, ComfyUI can fail in many ways; the templates package, for example, has changed its layout. The
    frontend may be newer than the pinned version, because users update it separately.

    Returns:
        The first one, or None if there are no environments next to this ComfyUI.

    Raises:
        UnfitEnvironment: there are environments, but none of them matches.
    """
    unfit = []
    for python in host.pythons:
        mismatches = _mismatches(python, host.pins)
        if not mismatches:
            return python
        unfit.append((python, mismatches))
    if not unfit:
        return None
    python, mismatches = unfit[0]
    requirements = host.path / "requirements.txt"
    if host.path in python.parents or python.parent.name == "python_embeded":
        remedy = f'"{python}" -m pip install -r "{requirements}"'
    else:  # another ComfyUI may use this environment
        own = host.path / "venv"
        install = f'"{own / python.relative_to(python.parents[1])}" -m pip install -r "{requirements}" pytest'
        remedy = f'"{sys.executable}" -m venv "{own}" && {install}'
    raise UnfitEnvironment(
        f"{python} does not match its requirements.txt ({'; '.join(mismatches)}). To run it: {remedy}"
    )


def _mismatches(python: Path, pins: dict[str, str]) -> list[str]:
    """Pinned packages that an environment lacks or has in another version, as texts."""
    command = [python, "-I", "-c", _VERSIONS, *pins]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):  # for example, if its base Python was removed
        return ["it does not start"]
    found = json.loads(done.stdout)
    return [
        f"{name} {wanted} required, {found.get(name, 'none')} installed"
        for name, wanted in pins.items()
        if not (found.get(name) == wanted or (name == _FRONTEND and _numbers(found.get(name, "")) > _numbers(wanted)))
    ]


def _package(requirement: str) -> str:
    """Package name of a line of a requirements.txt."""
    return re.split(r"[<>=~! \[]", requirement)[0]


def _numbers(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version)]


def _environment(name: str, steps: list[list[str]], key: str) -> Path:
    """Create an environment if it does not exist.

    Args:
        name: first part of the folder's name.
        steps: arguments of `pip install`, in order.
        key: further text that the hash in the folder's name depends on.

    Returns:
        Its Python.
    """
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
            print(f"Creating an environment for {name} in {folder} (once, takes a few minutes) ...", flush=True)
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
    """Wait while another run creates the same environment. Locks expire after an hour."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    announced = False
    while True:
        try:
            os.close(os.open(lock, os.O_CREAT | os.O_EXCL))
            return
        except FileExistsError:
            if not announced:
                print(f"Waiting for another run to create this environment (or delete {lock}) ...", flush=True)
                announced = True
            with contextlib.suppress(FileNotFoundError):  # the other run may finish right now
                if time.time() - lock.stat().st_mtime > _LOCK_SECONDS:
                    lock.unlink()
            time.sleep(2)
