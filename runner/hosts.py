"""Finds the ComfyUIs of this machine. Standard library only."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

PACK = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Host:
    """A ComfyUI folder."""

    path: Path

    @property
    def version(self) -> str:
        text = (self.path / "comfyui_version.py").read_text(encoding="utf-8")
        match = re.search(r'__version__\s*=\s*"([^"]+)"', text)
        return match.group(1) if match else "unknown"

    @property
    def own_python(self) -> Path | None:
        """The Python of the install's own environment, where it has one."""
        folders = [self.path / ".venv", self.path / "venv", self.path.parent / ".venv", self.path.parent / "venv"]
        candidates = [folder / part for folder in folders for part in ("bin/python", "Scripts/python.exe")]
        candidates.append(self.path.parent / "python_embeded" / "python.exe")
        return next((python for python in candidates if python.is_file()), None)


def is_host(path: Path) -> bool:
    return (path / "main.py").is_file() and (path / "comfyui_version.py").is_file()


def find_hosts() -> list[Host]:
    """`COMFYUI_PATH` (may list several), an enclosing install, then every ComfyUI under ~/comfy, the newest first.

    Raises:
        SystemExit: COMFYUI_PATH names a folder that is no ComfyUI.
    """
    named = [Path(part).expanduser() for part in os.environ.get("COMFYUI_PATH", "").split(os.pathsep) if part]
    for path in named:
        if not is_host(path):
            raise SystemExit(f"COMFYUI_PATH names {path}, which is no ComfyUI folder (no main.py in it).")
    if named:
        return _hosts(named)
    enclosing = [PACK.parents[1]] if PACK.parent.name == "custom_nodes" else []
    home = Path.home() / "comfy"
    found = [Host(path) for path in [home, *(sorted(home.iterdir()) if home.is_dir() else [])] if is_host(path)]
    found.sort(key=lambda host: [int(part) for part in re.findall(r"\d+", host.version)], reverse=True)
    return _hosts([path for path in enclosing if is_host(path)] + [host.path for host in found])


def _hosts(paths: list[Path]) -> list[Host]:
    """Each once, in order: the enclosing install may lie under ~/comfy too."""
    return [Host(path) for path in dict.fromkeys(path.resolve() for path in paths)]
