"""Two long runs in processes of their own, which start with the session and run alongside the servers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

import pytest


@pytest.mark.nightly
def test_the_cuda_tier_passes(long_run: Callable[[], tuple[int, str]]) -> None:
    """What the cuda tier asks of a GPU, asked of a simulated card."""
    code, output = long_run()
    assert code == 0, output[-5000:]
    assert re.search(r"\d+ passed", output) and "skipped" not in output, output[-500:]


def test_applies_in_one_process_do_not_exhaust_its_address_space(long_run: Callable[[], tuple[int, str]]) -> None:
    """Neither addresses nor pins of dynamic VRAM grow with the number of applies: the addresses would run out."""
    code, output = long_run()
    assert code == 0, output[-3000:]
    found = json.loads(output.splitlines()[-1])
    assert found["error"] is None
    assert found["changed"] == [] and found["distinct"] == 4
    assert len(found["offsets"]) >= 60 and not any(found["pins"])
    assert max(found["offsets"][20:]) <= max(found["offsets"][:20])
