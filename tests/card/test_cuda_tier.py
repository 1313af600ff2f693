"""What the cuda tier asks of a GPU, asked of a simulated card."""

from __future__ import annotations

import re
import subprocess
import sys

from runner.hosts import PACK


def test_the_cuda_tier_passes() -> None:
    command = [sys.executable, "-m", "pytest", "tests/cuda", "-p", "runner.simulated_card.plugin"]
    command += ["-q", "-p", "no:cacheprovider", "--durations=5"]
    done = subprocess.run(command, cwd=PACK, capture_output=True, text=True, check=False)
    print(done.stdout[-5000:])
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert re.search(r"\d+ passed", done.stdout) and "skipped" not in done.stdout
