"""Workflows through real servers on simulated cards, against a CPU: each mode of memory gives the same frames."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import numpy as np
import pytest

import clips
from card_servers import LORA
from runner.hosts import PACK
from runner.prompts import find, quick, unpatched
from runner.server import Prompt, Server
from runner.simulated_card import trace
from small_model import recipe
from workflow_inputs import FOLDER, small

#: In each mode; the other workflows in the two common ones.
EVERYWHERE = ("quickstart", "exvideo_low_memory", "exvideo_second_pass")
OTHERS = tuple(sorted(path.stem for path in FOLDER.glob("*.json") if path.stem not in EVERYWHERE))
#: fp16 on a card against fp32 on a CPU, in steps of 255.
MEAN, MOST = 0.5, 12


def only(*modes: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("mode", modes, indirect=True, scope="session")


def graph_of(name: str) -> Prompt:
    return quick() if name == "quickstart" else clips.lossless(small(name))


def check(server: Server, name: str, graph: Prompt, expected) -> np.ndarray:
    found = clips.frames(server, graph)
    apart = clips.difference(found, expected(name, graph))
    print(f"{name}: {apart}")
    assert apart.mean < MEAN and apart.most <= MOST
    return found


@pytest.mark.parametrize("name", EVERYWHERE)
def test_each_mode_of_memory(server: Server, name: str, expected) -> None:
    check(server, name, graph_of(name), expected)
