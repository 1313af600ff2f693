"""Two simulated cards with dynamic VRAM for the tests of this process; servers on simulated cards for the others."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

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
import comfy.memory_management  # noqa: E402
import comfy.model_patcher  # noqa: E402
import comfy_aimdo.control  # noqa: E402
import numpy as np  # noqa: E402

# As the host's main.py switches dynamic VRAM on.
comfy_aimdo.control.init_devices([(0, 0), (1, 0)])
comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcherDynamic
comfy.memory_management.aimdo_enabled = True

import card_servers  # noqa: E402
import clips  # noqa: E402
from runner.server import Prompt, Server  # noqa: E402


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
