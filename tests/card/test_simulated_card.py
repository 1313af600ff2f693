"""That simulated cards refuse what CUDA refuses, and count what CUDA counts."""

from __future__ import annotations

import copy
import gc
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from runner import simulated_card
from runner.hosts import PACK
from runner.simulated_card import GIB, MIB, Card, CardTensor, DeviceMismatch, IllegalAccess
from runner.simulated_card.dynamic import DynamicMemory, ModelVBAR
from runner.simulated_card.memory import CardMemory, PinnedMemory

CARD, OTHER = torch.device("cuda", 0), torch.device("cuda", 1)
Tensor = torch.Tensor


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    gc.collect()
    yield
    gc.collect()


def on(device: torch.device, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(device)


MIXED: dict[str, Callable[[Tensor, Tensor], object]] = {
    "add": lambda a, b: a + b,
    "linear": functional.linear,
    "conv2d": lambda a, b: functional.conv2d(a.view(1, 1, 4, 4), b.view(1, 1, 4, 4)),
    "cat": lambda a, b: torch.cat([a, b]),
    "stack": lambda a, b: torch.stack([a[0, 0], b[0, 0]]),
    "mul_": lambda a, b: a.mul_(b[0, 0]),
    "where": lambda a, b: torch.where(a > 0, a, b),
    "layer_norm": lambda a, b: functional.layer_norm(a, (4,), b[0], b[0]),
    "scaled_dot_product_attention": lambda a, b: functional.scaled_dot_product_attention(a, b, b),
    "index_select": lambda a, b: torch.index_select(a, 0, b[0].long() * 0),
    "copysign": lambda a, b: torch.copysign(a, b),
}


@pytest.mark.parametrize("name", MIXED)
@pytest.mark.parametrize("devices", [(torch.device("cpu"), CARD), (CARD, OTHER)])
def test_devices_do_not_mix(name: str, devices: tuple[torch.device, torch.device]) -> None:
    with pytest.raises(DeviceMismatch, match="Expected all tensors to be on the same device") as caught:
        MIXED[name](on(devices[0], 4, 4), on(devices[1], 4, 4))
    assert f"(in {name}" in str(caught.value)
    assert all(str(device) in str(caught.value) for device in devices)


def test_what_may_cross_devices() -> None:
    host, card, other = on(torch.device("cpu"), 4, 4), on(CARD, 4, 4), on(OTHER, 4, 4)
    assert (card + torch.tensor(1.0)).device == CARD
    assert torch.equal(card.cpu(), host) and torch.equal(card.to(OTHER).cpu(), host)
    assert card.copy_(other).device == CARD and host.copy_(card).device.type == "cpu"
    assert host.to(card).device == CARD and host.type_as(other).device == OTHER
    card[1:2] = host[:1]
    assert card[torch.tensor([0, 1])].device == CARD
    assert torch.zeros_like(card, device="cpu").device.type == "cpu"
    assert card.new_zeros(2).device == CARD and torch.arange(3, device="cuda:1").device == OTHER


def test_indices_of_a_card_index_no_other_device() -> None:
    index = torch.tensor([0, 1], device=CARD)
    for target in (torch.zeros(4), torch.zeros(4, device=OTHER)):
        with pytest.raises(DeviceMismatch, match="indices should be either on cpu or on the same device"):
            target[index]
    with pytest.raises(DeviceMismatch, match="__setitem__"):
        torch.zeros(4, device=CARD)[index] = torch.ones(2)
    assert torch.arange(4)[index[1]] == 1  # one number is read from the card


def test_numbers_are_read_by_name_alone() -> None:
    tensor = torch.tensor([1.5, 2.5], device=CARD)
    for read in (lambda: tensor.numpy(), lambda: np.asarray(tensor), lambda: torch.from_numpy(tensor.numpy())):
        with pytest.raises(TypeError, match="Use Tensor.cpu"):
            read()
    assert tensor.tolist() == [1.5, 2.5] and tensor[0].item() == 1.5 and float(tensor[1]) == 2.5
    assert [part.device for part in tensor] == [CARD, CARD]
    with pytest.raises(RuntimeError, match="can be pinned"):
        torch.empty(1, device=CARD, pin_memory=True)
    with pytest.raises(RuntimeError, match="generator"):
        torch.randn(1, device=CARD, generator=torch.Generator())
    with pytest.raises(NotImplementedError, match="autograd"):
        tensor.sum().backward()
    with pytest.raises(RuntimeError, match="invalid device ordinal"):
        torch.zeros(1, device="cuda:2")


def test_a_module_moves_with_its_parameters() -> None:
    module = torch.nn.Conv2d(2, 4, 3).requires_grad_(False)
    weight, picture = module.weight, torch.randn(1, 2, 5, 5)
    weight.mark = "kept"
    expected = module(picture)
    module.to(CARD)
    assert module.weight is weight and isinstance(weight, torch.nn.Parameter)
    assert weight.device == CARD and weight.mark == "kept" and isinstance(weight, CardTensor)
    assert torch.equal(module(picture.to(CARD)).cpu(), expected)
    assert copy.deepcopy(module).weight.device == CARD
    with pytest.raises(DeviceMismatch, match="conv2d"):
        module(picture)
    module.to("cpu")
    assert module.weight is weight and torch.equal(module(picture), expected)


def test_memory_is_counted_and_ends() -> None:
    memory = simulated_card.memory()
    before = memory.now
    memory.reset_peak()
    tensor = torch.empty(1000, 1000, device=CARD)
    assert memory.now - before == -(-4_000_000 // 512) * 512
    view, half = tensor[10:].t(), tensor.half()
    del tensor
    assert view.device == CARD and memory.now - before == 4_000_256 + 2_000_384
    del view, half
    assert memory.now == before and memory.peak - before == 4_000_256 + 2_000_384
    others = memory.free - MIB
    memory.allocate(others)
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate 2.00 MiB"):
        torch.empty(2 * MIB, dtype=torch.uint8, device=CARD)
    memory.release(others)
    assert memory.now == before and torch.cuda.mem_get_info(0)[0] == memory.free
    assert simulated_card.memory(1) is not memory


def test_memory_that_others_hold_is_not_free() -> None:
    memory = CardMemory(Card(8 * GIB, held=GIB), 0)
    memory.allocate(7 * GIB)
    with pytest.raises(torch.OutOfMemoryError):
        memory.allocate(1)


def test_pinned_memory_comes_in_powers_of_two_and_stays() -> None:
    pinned = simulated_card.pinned()
    torch._C._host_emptyCache()
    before = pinned.now
    tensor = torch.empty(5 * MIB, dtype=torch.uint8, pin_memory=True)
    assert tensor.is_pinned() and tensor[5:].is_pinned() and pinned.now - before == 8 * MIB
    assert not torch.empty(1).is_pinned() and torch.ones(3).pin_memory().is_pinned()
    del tensor
    assert pinned.cached >= 8 * MIB
    again = torch.empty(7 * MIB, dtype=torch.uint8).pin_memory()
    assert again.is_pinned() and pinned.now - before <= 8 * MIB + 512
    del again
    torch._C._host_emptyCache()
    assert pinned.now == before


def test_registered_ranges_do_not_overlap() -> None:
    pinned = PinnedMemory()
    assert pinned.register(1000, 100) == 0 and pinned.register(1099, 10) != 0
    assert pinned.holds(1099) and not pinned.holds(1100)
    assert pinned.unregister(1001) != 0 and pinned.unregister(1000) == 0 and pinned.now == 0


def test_a_counting_mode_sees_the_operators_of_a_card() -> None:
    class Counter(TorchDispatchMode):
        found: list[str] = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.found.append(str(func))
            return func(*args, **(kwargs or {}))

    tensor, host = on(CARD, 4, 4), torch.ones(4)
    with simulated_card.counting(Counter()):
        functional.silu(tensor @ tensor)
        functional.silu(host)
    assert [name for name in Counter.found if "silu" in name] == ["aten.silu.default"]


def test_a_thread_that_is_not_active_is_told_so() -> None:
    found = []

    class Bare(threading.Thread):
        def run(self) -> None:  # not the one that computes on cards
            try:
                torch.zeros(1, device="cuda")
            except RuntimeError as error:
                found.append(str(error))

    thread = Bare()
    thread.start()
    thread.join()
    assert len(found) == 1 and "outside of simulated_card.active()" in found[0]
    thread = threading.Thread(target=lambda: found.append(torch.zeros(1, device="cuda")))
    thread.start()
    thread.join()
    assert isinstance(found[1], CardTensor)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> DynamicMemory:
    """Dynamic VRAM on the second card, of which 10 MiB are free above a headroom of 2, in pages of 1 MiB."""
    memory = simulated_card.memory(1)
    gc.collect()
    state = DynamicMemory(memory, memory.free - 10 * MIB, MIB)
    monkeypatch.setitem(simulated_card.dynamic._states, 1, state)
    monkeypatch.setattr(memory, "make_room", state.make_room)
    return state


def fault(vbar: ModelVBAR, count: int) -> list[tuple[tuple, list[int] | None]]:
    places = [vbar.alloc(MIB) for _ in range(count)]
    return [(place, vbar.fault(*place[1:])) for place in places]


def test_weights_are_refused_when_the_room_ends(small: DynamicMemory) -> None:
    vbar = ModelVBAR(100 * MIB, 1)
    found = fault(vbar, 14)
    assert [signature is not None for _, signature in found] == [True] * 10 + [False] * 4
    assert (small.faults, small.misses, small.refusals, small.evictions) == (14, 14, 4, 0)
    assert vbar.pins == 10 and vbar.loaded_size() == 10 * MIB and vbar.offset == 14 * MIB
    # Looking for room, the watermark has passed pinned pages too: they go as soon as they are unpinned.
    assert vbar.watermark == 0 and vbar.fault(*found[0][0][1:]) is None
    vbar.unpin(*found[0][0][1:])
    assert vbar.loaded_size() == 9 * MIB
    vbar.prioritize()
    assert vbar.fault(*found[1][0][1:]) == found[1][1]
    with pytest.raises(MemoryError):
        vbar.alloc(87 * MIB)
    used = small.memory.now
    del vbar, found
    gc.collect()
    assert small.memory.now == used - 9 * MIB


def test_an_allocation_evicts_unpinned_weights_of_the_lowest_priority(small: DynamicMemory) -> None:
    first, second = ModelVBAR(40 * MIB, 1), ModelVBAR(40 * MIB, 1)
    low, high = fault(first, 4), fault(second, 4)
    weights = [vbar.tensor(*place[1:]) for vbar, found in ((first, low), (second, high)) for place, _ in found]
    assert weights[0].view(torch.float16).isnan().all()  # nothing has been copied there yet
    for place, _ in [*low[1:], *high]:
        place[0].unpin(*place[1:])
    tensor = torch.empty(5 * MIB, dtype=torch.uint8, device=OTHER)
    assert small.evictions == 3 and (first.loaded_size(), second.loaded_size()) == (MIB, 4 * MIB)
    with pytest.raises(IllegalAccess, match="evicted"):
        weights[1] + 1
    weights[0] + 1  # pinned
    signature = second.fault(*high[0][0][1:])
    assert signature == high[0][1]
    del tensor
    first.prioritize()
    assert first.fault(*low[3][0][1:]) != low[3][1]  # what it held is gone
    assert small.refusals == 0


HOLLOW = """
from runner import simulated_card as cards
cards.install((cards.Card(8 * cards.GIB),), hollow=True)
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

class Names(TorchDispatchMode):
    found = []
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.found.append(str(func))
        return func(*args, **(kwargs or {}))

with cards.active():
    big = torch.zeros(128, 320, 64, 64, dtype=torch.float16, device="cuda")
    assert cards.memory().now == big.nbytes == 128 * 320 * 64 * 64 * 2
    layer = torch.nn.Conv2d(320, 320, 3, padding=1).requires_grad_(False).half().to("cuda")
    out = layer(big)
    assert out.shape == big.shape and not out.is_meta and out.device.type == "cuda"
    tokens = big.flatten(2).transpose(1, 2).unflatten(2, (5, 64)).transpose(1, 2)
    with cards.counting(Names()):
        assert functional.scaled_dot_product_attention(tokens, tokens, tokens).shape == tokens.shape
    assert len(Names.found) == 1 and "attention" in Names.found[0]
    assert out.cpu().sum() == 0 and out[0, 0, 0, 0].item() == 0 and not bool((out > 0).any())
    try:
        big + torch.zeros(128, 320, 64, 64)
    except cards.DeviceMismatch:
        pass
    else:
        raise AssertionError("mixed devices")
    peak = cards.memory().peak
    assert 3 * big.nbytes < peak < 3.1 * big.nbytes, peak / big.nbytes
"""


def test_hollow_tensors_have_sizes_alone() -> None:
    done = subprocess.run([sys.executable, "-c", HOLLOW], cwd=PACK, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
