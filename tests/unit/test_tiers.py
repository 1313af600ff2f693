"""How `run.py test` sums up its tiers."""

from __future__ import annotations

from pathlib import Path

import pytest

from runner import tiers
from runner.hosts import Host
from runner.tiers import Outcome

REPORT = '<testsuites><testsuite tests="{0}" failures="{1}" errors="{2}" skipped="{3}"/></testsuites>'


def run(monkeypatch, outcomes: dict[str, Outcome], chosen=("unit", "host", "cuda"), hosts=(), notes=()) -> int:
    monkeypatch.setattr(tiers, "_run", lambda each, *rest, **named: (outcomes[each.name], f"output of {each.name}\n"))
    monkeypatch.setattr(tiers, "_has_gpu", lambda: False)
    return tiers.run(chosen, hosts, "no ComfyUI found.", [], False, notes)


def test_tiers_that_cannot_run_are_named(monkeypatch, capsys) -> None:
    assert run(monkeypatch, {"unit": Outcome("passed tier unit", passed=3)}, notes=["SKIPPED ComfyUI 1", "note"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[-6:] == [
        "SKIPPED ComfyUI 1", "note", "passed tier unit", "SKIPPED tier host: no ComfyUI found.",
        "SKIPPED tier cuda: no ComfyUI found.", "3 passed, 0 failed, 3 skipped",
    ]  # fmt: skip
    assert "output of unit" in printed


def test_one_failed_tier_fails_the_run(monkeypatch, capsys) -> None:
    hosts = [Host(Path("a")), Host(Path("b"))]
    monkeypatch.setattr(Host, "version", property(lambda self: self.path.name))
    outcomes = {
        "unit": Outcome("passed", passed=1), "host, ComfyUI a": Outcome("passed", passed=2),
        "host, ComfyUI b": Outcome("FAILED", passed=1, failed=1),
    }  # fmt: skip
    assert run(monkeypatch, outcomes, hosts=hosts) == 1
    printed = capsys.readouterr().out
    assert "SKIPPED tier cuda: no NVIDIA GPU found" in printed
    assert printed.endswith("4 passed, 1 failed, 1 skipped\n")


@pytest.mark.parametrize(
    ("counts", "code", "expected"),
    [
        ((5, 0, 0, 1), 0, Outcome("passed tier unit: 4 passed, 0 failed, 1 skipped", 4, 0, 1)),
        ((5, 1, 1, 1), 1, Outcome("FAILED tier unit: 2 passed, 2 failed, 1 skipped", 2, 2, 1)),
        ((0, 0, 0, 0), 5, Outcome("FAILED tier unit: 0 passed, 1 failed, 0 skipped", 0, 1, 0)),
        ((2, 0, 0, 2), 0, Outcome("FAILED tier unit: 0 passed, 1 failed, 2 skipped", 0, 1, 2)),
        ((5, 0, 0, 0), 2, Outcome("FAILED tier unit: 5 passed, 1 failed, 0 skipped", 5, 1, 0)),
    ],
)
def test_counts_of_a_report(tmp_path, counts, code: int, expected: Outcome) -> None:
    """No test that passed, or an interrupted run, is a failure."""
    path = tmp_path / "report.xml"
    path.write_text(REPORT.format(*counts))
    assert tiers._outcome("unit", path, code) == expected


def test_a_run_without_a_report_has_failed(tmp_path) -> None:
    assert tiers._outcome("unit", tmp_path / "none.xml", -9).failed == 1
