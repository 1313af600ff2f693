"""Runs the tiers of tests, side by side if there are several cores. Standard library only."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
import threading
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from .environment import host_python, own_python
from .hosts import PACK, Host

TIERS = ("unit", "parity", "post_tuning", "host", "card", "browser", "cuda")
HOSTLESS = ("unit", "parity", "post_tuning")
#: Tiers that take longest start first.
_LONGEST_FIRST = ("host", "card", "post_tuning", "browser", "parity", "unit", "cuda")
#: Tests run side by side, with one thread each: two threads are hardly faster for models this small.
_AT_ONCE = 2
#: The oldest ComfyUI that simulated cards support.
_CARD_HOST = (0, 33)
#: Packages that the tests need -> what to install.
_NEEDED = {"pytest": "pytest", "diffsynth": "--no-deps diffsynth==1.1.9"}
_NEEDED_BY_BROWSER = {"pytest": "pytest", "playwright": "playwright"}
_CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


@dataclass
class Outcome:
    """What became of a tier.

    Attributes:
        line: for the summary.
        passed, failed, skipped: numbers of tests; a skipped tier counts as one.
    """

    line: str
    passed: int = 0
    failed: int = 0
    skipped: int = 0


@dataclass(frozen=True)
class Run:
    """A tier, on a ComfyUI if it needs one."""

    tier: str
    host: Host | None

    @property
    def name(self) -> str:
        return self.tier if self.host is None else f"{self.tier}, ComfyUI {self.host.version}"


def run(
    tiers: Sequence[str],
    hosts: Sequence[Host],
    no_host: str,
    pytest: Sequence[str],
    everything: bool,
    notes: Sequence[str] = (),
) -> int:
    """Run tiers and print a summary.

    Args:
        hosts: ComfyUIs to test on.
        no_host: why there is none.
        pytest: arguments to pass on to it.
        everything: include the tests that are marked `nightly`.
        notes: lines for the summary; one that says SKIPPED counts as a skipped test.

    Returns:
        0 if no test failed, else 1.
    """
    runs: list[Run] = []
    outcomes: dict[str, Outcome] = {}
    for tier in (tier for tier in TIERS if tier in tiers):
        reason = _reason_to_skip(tier, hosts, no_host)
        if reason is not None:
            outcomes[tier] = Outcome(f"SKIPPED tier {tier}: {reason}", skipped=1)
            continue
        for each in [Run(tier, None)] if tier in HOSTLESS else [Run(tier, host) for host in hosts]:
            outcomes[each.name] = Outcome("")
            runs.append(each)
    runs.sort(key=lambda each: _LONGEST_FIRST.index(each.tier))
    at_once = min(_AT_ONCE, os.cpu_count() or 1, max(len(runs), 1))
    lock = threading.Lock()

    def one(each: Run) -> None:
        outcome, output = _run(each, pytest, everything, threads=max((os.cpu_count() or 1) // at_once, 1))
        with lock:
            print(f"\n=== tier {each.name} ===\n{output}{outcome.line}", flush=True)
        outcomes[each.name] = outcome

    if runs:
        print(f"Running {', '.join(each.name for each in runs)}, {at_once} at a time. Output follows as they end.")
    with ThreadPoolExecutor(at_once) as pool:
        list(pool.map(one, runs))
    print("\n" + "\n".join([*notes, *(outcome.line for outcome in outcomes.values())]))
    counts = {key: sum(vars(o)[key] for o in outcomes.values()) for key in ("passed", "failed", "skipped")}
    counts["skipped"] += sum(note.startswith("SKIPPED") for note in notes)
    print(", ".join(f"{number} {key}" for key, number in counts.items()))
    return int(counts["failed"] > 0)


def chromium() -> str | None:
    """The path of a Chromium or Chrome on this machine; no test downloads one."""
    named = os.environ.get("EXVIDEO_CHROMIUM")
    return named or next((found for name in _CHROMIUM if (found := shutil.which(name))), None)


def _reason_to_skip(tier: str, hosts: Sequence[Host], no_host: str) -> str | None:
    if not (PACK / "tests" / tier).is_dir():
        return f"there is no folder tests/{tier}."
    if tier in HOSTLESS:
        return None
    if not hosts:
        return no_host
    if tier == "browser" and chromium() is None:
        return "no Chromium found. Install one (Debian: apt install chromium), or set EXVIDEO_CHROMIUM to its path."
    if tier == "cuda" and not _has_gpu():
        return "no NVIDIA GPU found (nvidia-smi -L)."
    return None


def _run(each: Run, pytest: Sequence[str], everything: bool, threads: int) -> tuple[Outcome, str]:
    """Run a tier: its outcome, and what it printed."""
    if each.tier == "card" and each.host is not None and _numbers(each.host.version) < _CARD_HOST:
        oldest = ".".join(map(str, _CARD_HOST))
        return Outcome(f"SKIPPED tier {each.name}: simulated cards need ComfyUI {oldest} or newer.", skipped=1), ""
    try:
        python = own_python() if each.host is None else host_python(each.host)
    except subprocess.CalledProcessError as error:
        command = " ".join(map(str, error.cmd))
        return Outcome(f"FAILED tier {each.name}: {command} ended with {error.returncode}.", failed=1), ""
    needed = _NEEDED_BY_BROWSER if each.tier == "browser" else _NEEDED
    if missing := _missing(python, needed):
        steps = " && ".join(f'"{python}" -m pip install {needed[package]}' for package in missing)
        lacks = f"its Python lacks {' and '.join(missing)}. To install: {steps}"
        return Outcome(f"SKIPPED tier {each.name}: {lacks}", skipped=1), ""
    environment = {**os.environ, "PYTHONPATH": str(PACK), "PYTHONDONTWRITEBYTECODE": "1"}
    environment.setdefault("OMP_NUM_THREADS", str(threads))
    if everything:
        environment["EXVIDEO_EVERY_TEST"] = "1"
    if each.host is not None:
        environment |= {"EXVIDEO_HOST": str(each.host.path), "EXVIDEO_CHROMIUM": chromium() or ""}
    with tempfile.TemporaryDirectory() as folder:
        report, log = Path(folder) / "report.xml", Path(folder) / "log"
        command = [
            python,
            "-m",
            "pytest",
            f"tests/{each.tier}",
            "-q",
            "-ra",
            "--durations=10",
            "-p",
            "no:cacheprovider",
        ]
        command += [*(() if everything else ("-m", "not nightly")), f"--junitxml={report}", *pytest]
        with log.open("w") as output:
            done = subprocess.run(
                command, cwd=PACK, env=environment, stdout=output, stderr=subprocess.STDOUT, check=False
            )
        outcome = _outcome(each.name, report, done.returncode)
        return outcome, log.read_text(encoding="utf-8", errors="replace")


def _outcome(name: str, report: Path, code: int) -> Outcome:
    if not report.exists():
        return Outcome(f"FAILED tier {name}: pytest ended with {code}.", failed=1)
    suites = list(ElementTree.parse(report).getroot().iter("testsuite"))
    tests, failures, errors, skipped = (
        sum(int(suite.get(key, 0)) for suite in suites) for key in ("tests", "failures", "errors", "skipped")
    )
    failed = failures + errors
    if code != 0 and failed == 0:  # 5: no test was collected
        failed = 1
    passed = tests - failures - errors - skipped
    word = "passed" if passed and not failed else "FAILED"
    failed = max(failed, int(not passed))
    line = f"{word} tier {name}: {passed} passed, {failed} failed, {skipped} skipped"
    return Outcome(line, passed, failed, skipped)


def _missing(python: Path, needed: dict[str, str]) -> list[str]:
    """Packages that an environment lacks for the tests. Nothing is installed into a ComfyUI's own environment."""
    code = f"import importlib.util as u; print(*[n for n in {tuple(needed)} if not u.find_spec(n)])"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.split()


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


def _has_gpu() -> bool:
    tool = shutil.which("nvidia-smi")
    return tool is not None and subprocess.run([tool, "-L"], capture_output=True, check=False).returncode == 0
