"""Finds the ComfyUI installs of this machine. Standard library only."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

PACK = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Host:
    """A ComfyUI install.

    Attributes:
        path: its folder.
    """

    path: Path

    @property
    def version(self) -> str:
        """Version of this ComfyUI, or "unknown"."""
        text = (self.path / "comfyui_version.py").read_text(encoding="utf-8")
        match = re.search(r'__version__\s*=\s*"([^"]+)"', text)
        return match.group(1) if match else "unknown"

    @property
    def pythons(self) -> list[Path]:
        """Pythons of the environments in the install, then of those next to its folder.

        The latter may belong to another ComfyUI, see `environment.found_python`.
        """
        folders = [self.path / ".venv", self.path / "venv", self.path.parent / ".venv", self.path.parent / "venv"]
        candidates = [folder / part for folder in folders for part in ("bin/python", "Scripts/python.exe")]
        candidates.append(self.path.parent / "python_embeded" / "python.exe")
        return [python for python in candidates if python.is_file()]

    @property
    def requirements(self) -> list[str]:
        """Lines of the install's requirements.txt, without comments."""
        lines = (self.path / "requirements.txt").read_text(encoding="utf-8").splitlines()
        return [found for line in lines if (found := line.split("#")[0].strip())]

    @property
    def pins(self) -> dict[str, str]:
        """Pinned packages and their versions, such as the frontend and the templates."""
        found = (re.match(r"([\w.-]+)\s*==\s*([\w.+!-]+)$", line) for line in self.requirements)
        return {match[1]: match[2] for match in found if match}


def is_host(path: Path) -> bool:
    """Whether a folder is a ComfyUI install."""
    return (path / "main.py").is_file() and (path / "comfyui_version.py").is_file()


def find_hosts() -> list[Host]:
    """Find the folders in COMFYUI_PATH, or else the enclosing install and all installs under ~/comfy, newest first.

    Raises:
        SystemExit: a folder in COMFYUI_PATH is not a ComfyUI install.
    """
    named = [Path(part).expanduser() for part in os.environ.get("COMFYUI_PATH", "").split(os.pathsep) if part]
    for path in named:
        if not is_host(path):
            raise SystemExit(f"COMFYUI_PATH contains {path}, which is not a ComfyUI folder (it has no main.py).")
    if named:
        return _hosts(named)
    enclosing = [PACK.parents[1]] if PACK.parent.name == "custom_nodes" else []
    home = Path.home() / "comfy"
    found = [Host(path) for path in [home, *(sorted(home.iterdir()) if home.is_dir() else [])] if is_host(path)]
    found.sort(key=lambda host: [int(part) for part in re.findall(r"\d+", host.version)], reverse=True)
    return _hosts([path for path in enclosing if is_host(path)] + [host.path for host in found])


def _hosts(paths: list[Path]) -> list[Host]:
    """Remove duplicates, since the enclosing install may be under ~/comfy as well."""
    return [Host(path) for path in dict.fromkeys(path.resolve() for path in paths)]
