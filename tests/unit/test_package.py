"""What the registry takes: metadata, pictures, and an archive that needs nothing of what is left out of it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from PIL import Image

PACK = Path(__file__).resolve().parents[2]
PROJECT = (PACK / "pyproject.toml").read_text(encoding="utf-8")


def field(name: str) -> str:
    (found,) = re.findall(rf'^{name} = "(.+)"', PROJECT, re.MULTILINE)
    return found


def left_out() -> set[str]:
    """Top-level folders and modules that `.comfyignore` names."""
    lines = (PACK / ".comfyignore").read_text(encoding="utf-8").splitlines()
    return {line.strip("/").removesuffix(".py") for line in lines if line.startswith("/") and line.count("/") < 3}


def test_the_version_is_the_changelogs() -> None:
    newest = re.search(r"^## (\S+)", (PACK / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert newest is not None and newest[1] == field("version")


@pytest.mark.parametrize(("name", "shape"), [("Icon", 1.0), ("Banner", 21 / 9)])
def test_pictures_have_the_registrys_shape(name: str, shape: float) -> None:
    address = field(name)
    assert address.startswith(field("Repository").replace("github.com", "raw.githubusercontent.com") + "/main/")
    with Image.open(PACK / address.split("/main/")[1]) as picture:
        assert picture.width / picture.height == pytest.approx(shape, abs=0.01)
        assert name == "Banner" or picture.width <= 400


def test_the_archive_needs_nothing_that_is_left_out() -> None:
    assert {"runner", "tests", "benchmarks", "run"} <= left_out()
    folders = ("nodes", "exvideo_core", "small_model")
    for path in [PACK / "__init__.py", *(path for folder in folders for path in (PACK / folder).rglob("*.py"))]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & left_out(), f"{path.name} imports {names}"
