"""Makes Python environments in the user's cache folder, keyed by what they hold. Standard library only."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
import venv
from pathlib import Path

from .hosts import PACK, Host

_TORCH = ["torch==2.14.1", "torchvision==0.29.1"]
_ORACLE = ["--no-deps", "diffsynth==1.1.9"]
_LOCK_SECONDS = 3600


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
    requirements = PACK / "runner" / "requirements.txt"
    return _environment("standalone", [["-r", str(requirements)], _ORACLE], requirements.read_text(encoding="utf-8"))


def host_python(host: Host) -> Path:
    """A Python that can run a ComfyUI: its own environment's, else one of the cache folder's."""
    if host.own_python is not None:
        return host.own_python
    lines = (host.path / "requirements.txt").read_text(encoding="utf-8").splitlines()
    wanted = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    others = [line for line in wanted if re.split(r"[<>=~! \[]", line)[0] not in ("torch", "torchvision", "torchaudio")]
    # requests: ComfyUI 0.3.64 imports it and counts on transformers to bring it, which version 5 no longer does.
    tools = ["requests", "pytest", "playwright", "comfyui-manager==4.2.2"]
    steps = [_TORCH, ["--no-deps", "torchaudio"], [*others, *_TORCH, *tools], _ORACLE]
    return _environment(f"comfyui-{host.version}", steps, "\n".join(others))


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
