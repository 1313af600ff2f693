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
    def pythons(self) -> list[Path]:
        """Pythons of the environments that lie with the install: its own first, then those beside its folder.

        One beside it may have been made for another ComfyUI in the same place: see `environment.found_python`.
        """
        folders = [self.path / ".venv", self.path / "venv", self.path.parent / ".venv", self.path.parent / "venv"]
        candidates = [folder / part for folder in folders for part in ("bin/python", "Scripts/python.exe")]
        candidates.append(self.path.parent / "python_embeded" / "python.exe")
        return [python for python in candidates if python.is_file()]

    @property
    def requirements(self) -> list[str]:
        """Packages that the install asks for, as in its requirements.txt, without comments."""
        lines = (self.path / "requirements.txt").read_text(encoding="utf-8").splitlines()
        return [found for line in lines if (found := line.split("#")[0].strip())]

    @property
    def pins(self) -> dict[str, str]:
        """Packages that the install asks for in one version only, such as its frontend's and its templates'."""
        found = (re.match(r"([\w.-]+)\s*==\s*([\w.+!-]+)$", line) for line in self.requirements)
        return {match[1]: match[2] for match in found if match}


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
