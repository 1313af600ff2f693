"""Imports inside the pack point one way, and only the folders named after a library import it."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

PACK = Path(__file__).resolve().parents[2]
CORE = PACK / "exvideo_core"


def imports(path: Path) -> list[ast.ImportFrom | ast.Import]:
    return [
        node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.ImportFrom | ast.Import)
    ]


def own_imports(path: Path) -> set[Path]:
    """Files of the pack that a file imports from."""
    found = set()
    for node in imports(path):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        folder = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
        candidates = [folder.with_suffix(".py"), *(folder / f"{alias.name}.py" for alias in node.names)]
        found |= {candidate for candidate in candidates if candidate.is_file()}
    return found


def test_imports_have_no_cycle() -> None:
    graph = {path: own_imports(path) for path in CORE.rglob("*.py")}
    assert len(list(TopologicalSorter(graph).static_order())) == len(graph)
    assert graph[CORE / "comfyui" / "apply" / "patch.py"] > {CORE / "comfyui" / "model.py"}


def test_folders_point_one_way() -> None:
    graph: dict[str, set[str]] = {}
    for path in CORE.rglob("*.py"):
        folder = path.parent.relative_to(CORE).as_posix()
        if path.parent != CORE and path.name not in ("model.py", "wrappers.py", "inspect.py"):
            others = {other.parent.relative_to(CORE).as_posix() for other in own_imports(path)}
            graph.setdefault(folder, set()).update(others - {folder, ".", "comfyui"})
    TopologicalSorter(graph).prepare()  # raises CycleError
    assert "comfyui/low_memory" in graph["comfyui/apply"]


def test_libraries_stay_in_their_folder() -> None:
    homes = {"comfy": {"comfyui"}, "latent_preview": {"comfyui"}, "diffusers": {"diffusers"}}
    for path in CORE.rglob("*.py"):
        top = path.relative_to(CORE).parts[0]
        if top == "post_tuning":  # its annotations name diffusers' classes
            continue
        for node in imports(path):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            if isinstance(node, ast.ImportFrom) and node.level:
                assert not (node.module or "").startswith("nodes"), path
                continue
            for library, folders in homes.items():
                assert all(name.split(".")[0] != library for name in names) or top in folders, (path, names)
