"""A short run of the soak and fuzz benchmarks: each exits with an error when anything goes wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from runner.hosts import PACK

pytestmark = pytest.mark.nightly


def run(name: str, results: Path, *arguments: str) -> list[dict]:
    """Rows that a benchmark writes."""
    environment = {**os.environ, "EXVIDEO_RESULTS": str(results)}
    command = [sys.executable, "-m", f"benchmarks.{name}", *arguments]
    done = subprocess.run(command, cwd=PACK, env=environment, capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (file,) = results.glob(f"{name}*.json")
    return json.loads(file.read_text(encoding="utf-8"))["rows"]


def test_mixed_prompts_with_cancellations_and_errors_leave_a_server_intact(tmp_path) -> None:
    (row,) = run("soak", tmp_path, "--prompts", "40")
    # ComfyUI's own leak warnings do not count: see docs/reliability.md.
    assert row["wrong"] == row["files_left"] == 0
    assert row["good"] > 10 and min(row["cancelled"], row["invalid"], row["error"]) > 0


def test_corrupted_files_are_refused(tmp_path) -> None:
    total = run("fuzz", tmp_path, "--files", "300")[-1]
    assert total["files"] == 300 and total["refused"] > 200
    assert not any(total[outcome] for outcome in ("other_exception", "crash", "hang", "left_something"))
