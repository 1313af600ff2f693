"""What users do on cards: LoRAs, cancelling, alternation, previews, other devices for a model, two cards for one."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable

import numpy as np
import pytest

import card_servers
import clips
from runner.prompts import find, quick, unpatched
from runner.server import Prompt, Server
from runner.simulated_card import trace

Expected = Callable[[str, Prompt], np.ndarray]
BOTH = pytest.mark.parametrize("mode", ["static", "dynamic"], indirect=True, scope="session")
EACH = pytest.mark.parametrize("mode", ["static", "dynamic", "pressure"], indirect=True, scope="session")
PLACES = pytest.mark.parametrize("place", ["before", "after"])


def inserted(graph: Prompt, kind: str, inputs: dict, place: str, socket: str = "model", output: int = 0) -> Prompt:
    """With a node before or after ExVideoApply, or after the loader's `output`, that changes what all others read."""
    graph = copy.deepcopy(graph)
    source = [find(graph, "ExVideoApply" if place == "after" else "ExVideoCheckpointLoader"), output]
    for node in graph.values():
        node["inputs"] = {name: ["new", 0] if value == source else value for name, value in node["inputs"].items()}
    graph["new"] = {"class_type": kind, "inputs": {socket: source, **inputs}}
    return graph


def with_lora(graph: Prompt, place: str) -> Prompt:
    lora = {"lora_name": card_servers.LORA, "strength_model": 1.0}
    return inserted(graph, "LoraLoaderModelOnly", lora, place)


def last(server: Server, event: str, **details: object) -> dict:
    """The last record of an event in the server's log."""
    records = trace.read(server.log())
    return next(r for r in reversed(records) if r["event"] == event and details.items() <= r.items())


@EACH
@PLACES
def test_a_lora_before_or_after_the_extension(server: Server, place: str, expected: Expected) -> None:
    found = clips.frames(server, with_lora(quick(), place))
    clips.assert_near(found, expected(f"lora {place}", with_lora(quick(), place)), f"LoRA {place}")
    assert clips.difference(found, expected("quickstart", quick())).mean > 10 * clips.MEAN


@EACH
def test_patched_and_unpatched_in_turn(server: Server, expected: Expected) -> None:
    patched, plain = clips.frames(server, quick()), clips.frames(server, unpatched(quick()))
    clips.assert_near(patched, expected("quickstart", quick()), "patched")
    clips.assert_near(plain, expected("unpatched", unpatched(quick())), "unpatched")
    assert np.array_equal(clips.frames(server, quick()), patched)
    assert np.array_equal(clips.frames(server, unpatched(quick())), plain)
    clips.frames(server, with_lora(quick(), "after"))
    assert np.array_equal(clips.frames(server, quick()), patched)


@EACH
def test_cancelled_in_the_middle_it_is_right_again(server: Server) -> None:
    before = clips.frames(server, quick())
    timer = []

    def cancel(node: str, step: int, steps: int) -> None:
        if step >= 2 and not timer:
            timer.append(threading.Thread(target=server.interrupt))
            timer[0].start()

    assert server.run(quick(frames=16, steps=40), cancel).status == "interrupted"
    timer[0].join()
    assert np.array_equal(clips.frames(server, quick()), before)
    assert not any(vbar["pins"] for card in trace.read(server.log())[-1]["dynamic"] for vbar in card["vbars"])


@pytest.mark.parametrize("mode", ["dynamic"], indirect=True, scope="session")
def test_previews_are_sent_while_it_samples(server: Server) -> None:
    result = server.run(quick(steps=4))
    assert result.status == "success" and result.previews >= 4


@BOTH
@PLACES
@pytest.mark.parametrize("device", ["cpu", "gpu:1"])
def test_the_hosts_select_model_device(server: Server, place: str, device: str, expected: Expected) -> None:
    graph = inserted(quick(), "SelectModelDevice", {"device": device}, place)
    clips.assert_near(clips.frames(server, graph), expected("quickstart", quick()), f"{device} {place}")
    peaks = [card["peak"] - card["now"] for card in last(server, "end", node="KSampler")["cards"]]
    assert [peak > 2**16 for peak in peaks] == [False, device == "gpu:1"]
    assert "passing through unchanged" not in server.log()


@BOTH
def test_the_hosts_select_vae_device(server: Server, expected: Expected) -> None:
    graph = inserted(quick(), "SelectVAEDevice", {"device": "gpu:1"}, "before", "vae", 2)
    clips.assert_near(clips.frames(server, graph), expected("quickstart", quick()), "VAE on the second card")
    first, second = last(server, "end", node="ExVideoDecode")["cards"]
    assert second["peak"] > second["now"] and first["peak"] == first["now"]


@BOTH
@PLACES
def test_two_cards_share_a_clips_conditions(server: Server, place: str, expected: Expected) -> None:
    guided = quick(KSampler={"steps": 2, "cfg": 2.5})
    graph = inserted(guided, "MultiGPU_WorkUnits", {"max_gpus": 2}, place)
    clips.assert_near(clips.frames(server, graph), expected("guided", guided), f"two cards, {place}")
    assert all(card["peak"] > card["now"] for card in last(server, "end", node="KSampler")["cards"])
