"""Two simulated cards with dynamic VRAM for the tests of this process; servers on simulated cards for the others."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import pytest

HOST = Path(os.environ["EXVIDEO_HOST"])
# The models are small: more threads, here and in the servers, wait for each other rather than work.
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(HOST))

from runner import simulated_card  # noqa: E402

simulated_card.install([simulated_card.Card(24 * simulated_card.GIB)] * 2, dynamic=True)
_mode = simulated_card.active()
_mode.__enter__()
simulated_card.activate_threads()

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing(False)
import numpy as np  # noqa: E402

import card_applies  # noqa: E402
import card_servers  # noqa: E402
import clips  # noqa: E402
from runner.hosts import PACK  # noqa: E402
from runner.server import Prompt, Server  # noqa: E402

card_applies.enable_dynamic_vram()

#: A leak of address space showed at the 48th.
APPLIES = "200" if "EXVIDEO_EVERY_TEST" in os.environ else "60"
LONG_RUNS = {
    "test_the_cuda_tier_passes": [
        "-m", "pytest", "tests/cuda", "-p", "runner.simulated_card.plugin", "-q", "-p", "no:cacheprovider",
    ],
    "test_applies_in_one_process_do_not_exhaust_its_address_space": ["tests/card_applies.py", str(HOST), APPLIES],
}  # fmt: skip
_running: dict[str, tuple[subprocess.Popen[str], IO[str]]] = {}


#: Memory modes that every run tests; the others are nightly.
EVERY_RUN = ("static", "dynamic", "pressure")
#: Tests that every run makes in each of these modes; it makes the others in "dynamic" only.
IN_EACH_MODE = ("test_each_mode_of_memory", "test_the_modes_are_what_they_are_called")
#: Workflows that take longest, and those that the host tier covers as well.
NIGHTLY_WORKFLOWS = ("exvideo_second_pass", "exvideo_compare", "exvideo_first_last_frame", "exvideo_long_video")


def _is_nightly(item: pytest.Item) -> bool:
    """Whether a test repeats in another mode, place or workflow what shorter ones show."""
    params = item.callspec.params if hasattr(item, "callspec") else {}
    mode = params.get("mode")
    if mode is None:
        return False
    wanted = EVERY_RUN if item.originalname in IN_EACH_MODE else ("dynamic",)
    return mode not in wanted or params.get("place") == "before" or params.get("name") in NIGHTLY_WORKFLOWS


@pytest.hookimpl(tryfirst=True)
def pytest_itemcollected(item: pytest.Item) -> None:
    if _is_nightly(item):
        item.add_marker(pytest.mark.nightly)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.name in LONG_RUNS)  # waited for at the end


def pytest_collection_finish(session: pytest.Session) -> None:
    for name in LONG_RUNS.keys() & {item.name for item in session.items}:
        output = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the session
        command = [sys.executable, *LONG_RUNS[name]]
        _running[name] = subprocess.Popen(command, cwd=PACK, stdout=output, stderr=subprocess.STDOUT, text=True), output


def pytest_sessionfinish(session: pytest.Session) -> None:
    for process, output in _running.values():
        process.kill()
        output.close()


@pytest.fixture
def long_run(request: pytest.FixtureRequest) -> Callable[[], tuple[int, str]]:
    """Waits for the run that bears the test's name: its exit status and what it printed."""

    def wait() -> tuple[int, str]:
        process, output = _running[request.node.name]
        code = process.wait()
        output.seek(0)
        return code, output.read()

    return wait


@pytest.fixture(scope="session")
def cpu() -> Iterator[Server]:
    with card_servers.make(HOST, ["--cpu"]) as server:
        yield server


@pytest.fixture(scope="session")
def expected(cpu: Server) -> Callable[[str, Prompt], np.ndarray]:
    """The frames that a CPU makes of a workflow; each is run once, by its name."""
    found: dict[str, np.ndarray] = {}

    def frames(name: str, graph: Prompt) -> np.ndarray:
        if name not in found:
            found[name] = clips.frames(cpu, graph)
        return found[name]

    return frames


@pytest.fixture(scope="session")
def alike() -> Callable[[str, np.ndarray], None]:
    """Refuses frames of a workflow that differ from those of the mode of memory before."""
    found: dict[str, np.ndarray] = {}

    def check(name: str, frames: np.ndarray) -> None:
        assert np.array_equal(frames, found.setdefault(name, frames)), clips.difference(frames, found[name])

    return check


@pytest.fixture(scope="session", params=card_servers.MODES)
def mode(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def server(mode: str) -> Iterator[Server]:
    """A server in each mode of memory in turn."""
    chosen = card_servers.MODES[mode]
    with card_servers.make(HOST, chosen.arguments, chosen.simulation) as server:
        yield server
