"""Replaces `torch.cuda` while cards are simulated.

Operators run immediately and in order, so streams and events never have to wait.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace, TracebackType
from typing import Any

import torch

from . import devices
from .memory import CardMemory, machine

Device = torch.device | str | int | None


@dataclass(frozen=True)
class Properties:
    """The result of `torch.cuda.get_device_properties`."""

    name: str
    major: int
    minor: int
    total_memory: int
    multi_processor_count: int = 128
    gcnArchName: str = ""  # noqa: N815 - PyTorch's name
    is_integrated: int = 0
    warp_size: int = 32


class Stream:
    """A stream whose work completes immediately."""

    _handles = itertools.count(1)

    def __init__(self, device: Device = None, priority: int = 0, **_: Any) -> None:  # noqa: ANN401
        self.device = torch.device("cuda", _index(device))
        self.device_index = self.device.index
        self.priority = priority
        self.cuda_stream = next(self._handles)
        self._outer: list[Stream] = []

    def wait_stream(self, stream: Stream) -> None:
        _require(stream, Stream)

    def wait_event(self, event: Event) -> None:
        _require(event, Event)

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True

    def __enter__(self) -> Stream:
        self._outer.append(_swap_stream(self))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _swap_stream(self._outer.pop())


class Event:
    """An event that completes as soon as it is recorded."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> None:
        self._time: float | None = None

    def record(self, stream: Stream | None = None) -> None:
        self._time = time.perf_counter()

    def wait(self, stream: Stream | None = None) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds between this event and `end`.

        Raises:
            RuntimeError: one of the events has not been recorded.
        """
        if self._time is None or end._time is None:
            raise RuntimeError("Both events must be recorded before calculating elapsed time.")
        return (end._time - self._time) * 1000


class device:  # noqa: N801 - PyTorch's name
    """`with torch.cuda.device(...)`."""

    def __init__(self, device: Device) -> None:
        self.idx = _index(device)
        self._before = 0

    def __enter__(self) -> None:
        self._before = devices.current()
        devices.set_current(self.idx)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        devices.set_current(self._before)


_streams = threading.local()
_default_streams: dict[int, Stream] = {}


def default_stream(device: Device = None) -> Stream:
    index = _index(device)
    if index not in _default_streams:
        _default_streams[index] = Stream(index)
    return _default_streams[index]


def current_stream(device: Device = None) -> Stream:
    index = _index(device)
    return _thread_streams().get(index) or default_stream(index)


@contextmanager
def stream(stream: Stream | None) -> Iterator[None]:
    if stream is None:
        yield
        return
    with device(stream.device), stream:
        yield


def _swap_stream(stream: Stream) -> Stream:
    """Make a stream its card's current one, and return the previous one."""
    previous = current_stream(stream.device)
    _thread_streams()[stream.device_index] = stream
    return previous


def _thread_streams() -> dict[int, Stream]:
    if not hasattr(_streams, "current"):
        _streams.current = {}
    return _streams.current


def _require(value: Any, kind: type) -> None:  # noqa: ANN401
    if not isinstance(value, kind):
        raise TypeError(f"Expected a {kind.__name__} of a simulated card, got {type(value).__name__}.")


def _index(device: Device) -> int:
    index = devices.card_index(device)
    if index is None:
        raise ValueError(f"Expected a cuda device, but got: {device}")
    return index


def _memory(device: Device = None) -> CardMemory:
    return machine.cards[_index(device)]


def _properties(device: Device = None) -> Properties:
    card = _memory(device).card
    return Properties(card.name, *card.capability, card.total)


def _stats(device: Device = None) -> dict[str, int]:
    memory = _memory(device)
    return {
        f"{kind}_bytes.all.{when}": value
        for kind in ("allocated", "active", "reserved", "requested")
        for when, value in (("current", memory.now), ("peak", memory.peak))
    }


def _outside(*_: Any) -> None:  # noqa: ANN401
    raise RuntimeError("This thread uses a simulated card outside of simulated_card.active().")


def _no_record_stream(tensor: torch.Tensor, stream: Stream) -> None:
    raise NotImplementedError(f"record_stream needs a tensor on a card, not on {tensor.device}.")


class _NoGraphs:
    """Replaces CUDA graphs, which simulated cards do not support."""

    def __init__(self, *_: Any, **__: Any) -> None:  # noqa: ANN401
        raise NotImplementedError("Simulated cards do not support CUDA graphs.")


def install() -> None:
    """Patch `torch.cuda`."""

    def answer(value: Any = None) -> Any:  # noqa: ANN401
        """A new function each time, because PyTorch's compiler requires distinct ones."""
        return lambda *_, **__: value

    runtime = SimpleNamespace(
        cudaHostRegister=lambda address, size, flags: machine.pinned.register(address, size),
        cudaHostUnregister=lambda address: machine.pinned.unregister(address),
        cudaMemGetInfo=lambda index: (machine.cards[index].free, machine.cards[index].card.total),
    )
    replacements: dict[str, Any] = {
        "_lazy_init": _outside,
        "init": answer(),
        "is_available": answer(True),
        "is_initialized": answer(True),
        "device_count": lambda: len(machine.cards),
        "current_device": devices.current,
        "set_device": lambda device: devices.set_current(_index(device)),
        "device": device,
        "get_device_name": lambda device=None: _memory(device).card.name,
        "get_device_capability": lambda device=None: _memory(device).card.capability,
        "get_device_properties": _properties,
        "get_allocator_backend": answer("native"),
        "is_bf16_supported": answer(True),
        "is_tf32_supported": answer(True),
        "is_current_stream_capturing": answer(False),
        "can_device_access_peer": answer(True),
        "cudart": answer(runtime),
        "Stream": Stream,
        "Event": Event,
        "stream": stream,
        "current_stream": current_stream,
        "default_stream": default_stream,
        "set_stream": _swap_stream,
        "synchronize": answer(),
        "ipc_collect": answer(),
        "CUDAGraph": _NoGraphs,
        "manual_seed": answer(),
        "manual_seed_all": answer(),
        "seed": answer(),
        "seed_all": answer(),
    }
    memory_functions: dict[str, Any] = {
        "empty_cache": answer(),
        "mem_get_info": lambda device=None: (_memory(device).free, _memory(device).card.total),
        "memory_stats": _stats,
        "memory_allocated": lambda device=None: _memory(device).now,
        "memory_reserved": lambda device=None: _memory(device).now,
        "max_memory_allocated": lambda device=None: _memory(device).peak,
        "max_memory_reserved": lambda device=None: _memory(device).peak,
        "reset_peak_memory_stats": lambda device=None: _memory(device).reset_peak(),
        "memory_summary": lambda device=None, abbreviated=False: f"{_memory(device).now} bytes allocated",
    }
    for name, value in {**replacements, **memory_functions}.items():
        setattr(torch.cuda, name, value)
    for name, value in memory_functions.items():
        setattr(torch.cuda.memory, name, value)
    torch.Tensor.record_stream = _no_record_stream  # type: ignore[method-assign] - CardTensor has its own
    torch._C._host_emptyCache = machine.pinned.empty_cache  # type: ignore[attr-defined]
    if torch.version.cuda is None:
        torch.version.cuda = "13.0"  # by which ComfyUI recognizes a build for NVIDIA
