"""Which Python a ComfyUI is run with: one that has the packages that this ComfyUI pins."""

from __future__ import annotations

import re
import sys
import venv
from pathlib import Path

import pytest

import run
from runner import environment
from runner.environment import UnfitEnvironment, found_python, host_python
from runner.hosts import PACK, Host

REQUIREMENTS = """comfyui-frontend-package==1.27.10
comfyui-workflow-templates==0.1.95  # a comment
comfyui_embedded_docs == 0.2.6

#non essential dependencies:
torch
numpy>=1.25.0
pydantic~=2.0
"""
FITTING = {
    "comfyui_frontend_package": "1.27.10",
    "comfyui_workflow_templates": "0.1.95",
    "comfyui_embedded_docs": "0.2.6",
}
NEWER = {
    "comfyui_frontend_package": "1.49.6",
    "comfyui_workflow_templates": "0.11.44",
    "comfyui_embedded_docs": "0.5.10",
}


@pytest.fixture
def host(tmp_path: Path) -> Host:
    """A ComfyUI folder of one version, without an environment."""
    folder = tmp_path / "ComfyUI-0.3.64"
    folder.mkdir()
    (folder / "main.py").write_text("")
    (folder / "comfyui_version.py").write_text('__version__ = "0.3.64"\n')
    (folder / "requirements.txt").write_text(REQUIREMENTS)
    return Host(folder)


def make(folder: Path, packages: dict[str, str]) -> Path:
    """An environment whose packages are there by name and version only; its Python."""
    venv.create(folder, symlinks=sys.platform != "win32")
    (site,) = [path for path in folder.rglob("site-packages") if "64" not in path.parts[-3]]
    for name, version in packages.items():
        info = site / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    return folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


def test_pins_are_read_from_the_requirements(host: Host) -> None:
    assert host.pins == {
        "comfyui-frontend-package": "1.27.10",
        "comfyui-workflow-templates": "0.1.95",
        "comfyui_embedded_docs": "0.2.6",
    }
    assert "numpy>=1.25.0" in host.requirements and len(host.requirements) == 6


def test_an_environment_beside_the_folder_serves_where_it_fits(host: Host) -> None:
    assert found_python(host) is None
    assert found_python(host) is None and host.pythons == []
    shared = make(host.path.parent / "venv", FITTING)
    assert found_python(host) == host_python(host) == shared
    own = make(host.path / "venv", FITTING)
    assert found_python(host) == own


def test_one_that_is_made_for_another_comfyui_is_refused(host: Host) -> None:
    shared = make(host.path.parent / "venv", NEWER)
    with pytest.raises(UnfitEnvironment) as error:
        host_python(host)
    text = str(error.value)
    assert "\n" not in text and str(shared) in text
    assert (
        "comfyui-workflow-templates 0.1.95 required, 0.11.44 installed; comfyui_embedded_docs 0.2.6 required, 0.5.10"
        in text
    )
    assert f'-m venv "{host.path / "venv"}"' in text and f'-r "{host.path / "requirements.txt"}"' in text
    own = make(host.path / "venv", FITTING)
    assert host_python(host) == own


def test_the_own_one_that_is_old_gives_way_or_is_told_how_to_be_renewed(host: Host) -> None:
    own = make(host.path / "venv", FITTING | {"comfyui_workflow_templates": "0.1.90"})
    with pytest.raises(UnfitEnvironment, match=re.escape(f'To run it: "{own}" -m pip install -r')):
        found_python(host)
    shared = make(host.path.parent / "venv", FITTING)
    assert found_python(host) == shared


@pytest.mark.parametrize(
    ("version", "fits"), [("1.27.10", True), ("1.27.11", True), ("1.28.0", True), ("1.27.9", False), (None, False)]
)
def test_a_frontend_may_be_newer(host: Host, version: str | None, fits: bool) -> None:
    others = {name: found for name, found in FITTING.items() if "frontend" not in name}
    make(host.path / "venv", others | ({"comfyui_frontend_package": version} if version else {}))
    if fits:
        assert found_python(host) is not None
    else:
        with pytest.raises(UnfitEnvironment, match=f"frontend-package 1.27.10 required, {version or 'none'} installed"):
            found_python(host)


def test_a_python_that_does_not_start_is_none(host: Host) -> None:
    (host.path / "venv" / "bin").mkdir(parents=True)
    (host.path / "venv" / "bin" / "python").write_text("not executable")
    with pytest.raises(UnfitEnvironment, match="it does not start"):
        found_python(host)


def test_a_comfyui_without_an_environment_that_fits_is_skipped_by_name(host: Host, monkeypatch, capsys) -> None:
    make(host.path.parent / "venv", NEWER)
    fits = Host(host.path.with_name("ComfyUI-0.33.0"))
    fits.path.mkdir()
    (fits.path / "comfyui_version.py").write_text('__version__ = "0.33.0"\n')
    (fits.path / "requirements.txt").write_text("\n".join(f"{name}=={version}" for name, version in NEWER.items()))
    hosts, lines = run.usable([fits, host])
    assert hosts == [fits] and len(lines) == 1
    assert run.usable([fits, host], most=1) == ([fits], [])  # those after it are not looked at
    assert lines[0].startswith(f"SKIPPED ComfyUI 0.3.64 ({host.path}): ")
    assert capsys.readouterr().err == f"{lines[0]}\n"

    monkeypatch.setattr(run, "find_hosts", lambda: [host])
    assert run.run_tests(("host",), []) == 0
    told = capsys.readouterr().out.splitlines()
    assert lines[0] in told and told[-1] == "0 passed, 0 failed, 2 skipped"
    assert f"SKIPPED tier host: {run.NONE_USABLE}" in told
    assert run.demo(host.path / "nothing") == run.demo(host.path) == 1


def test_another_torch_can_be_named(host: Host, monkeypatch) -> None:
    """As the workflow on GitHub does, for both kinds of environment."""
    made = {}
    monkeypatch.setattr(environment, "_environment", lambda name, steps, key: made.update({name: steps}) or Path(name))
    named = ["torch==2.8.0", "torchvision==0.23.0", "torchaudio==2.8.0"]
    monkeypatch.setattr(environment, "_TORCH", named)
    environment.own_python()
    host_python(host)
    own, hosts = made["standalone"], made["comfyui-0.3.64"]
    assert [package for package in own[0] if package.startswith("torch")] == named[:1] and "numpy" in own[0]
    assert hosts[:2] == [named, ["--no-deps", "torchaudio==2.8.0"]]
    assert [package for package in hosts[2] if package.startswith("torch")] == named
    workflow = (PACK / ".github" / "workflows" / "test.yml").read_text(encoding="utf-8")
    assert " ".join(named) in workflow and "EXVIDEO_TORCH: ${{ matrix.torch }}" in workflow
    assert set(re.findall(r'python: "([\d.]+)"', workflow)) == {"3.10", "3.11", "3.13"}
