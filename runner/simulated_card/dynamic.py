"""Replaces `comfy_aimdo`, the library behind ComfyUI's dynamic VRAM, which loads and evicts weights by pages.

Each model's weights have their own address range (a VBAR). To use a weight, ComfyUI faults its pages in and pins them.
When memory is needed, unpinned pages are evicted, starting with the last pages of the least recently prepared model.
Only pages below a model's watermark may be resident: evictions lower it, preparing the model resets it.
"""

from __future__ import annotations

import sys
import threading
import types
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch

from . import transfer
from .memory import MIB, CardMemory, machine
from .tensor import CardTensor, IllegalAccess, allocation_of

PAGE = 32 * MIB

#: Location of a weight, as ComfyUI passes it around: VBAR or buffer, address, bytes.
Location = tuple["ModelVBAR | transfer.VRAMBuffer", int, int]


@dataclass(eq=False)
class DynamicMemory:
    """Dynamic VRAM on one card.

    Attributes:
        memory: memory of the card.
        headroom: bytes of the card to leave free.
        page: page size in bytes.
        faults: number of requests for weights.
        misses: number of requests whose weights were not resident.
        refusals: number of requests for which there was not enough memory, so that ComfyUI streams the weights.
        evictions: number of evicted pages.
    """

    memory: CardMemory
    headroom: int
    page: int = PAGE
    faults: int = 0
    misses: int = 0
    refusals: int = 0
    evictions: int = 0
    lock: threading.RLock = field(default_factory=threading.RLock, repr=False)
    #: By ascending priority.
    _order: list[weakref.ref[ModelVBAR]] = field(default_factory=list, repr=False)

    @property
    def vbars(self) -> list[ModelVBAR]:
        """The VBARs in use, by ascending priority."""
        return list(self._alive())

    def _alive(self) -> Iterator[ModelVBAR]:
        for reference in list(self._order):
            vbar = reference()
            if vbar is not None:
                yield vbar

    def place(self, vbar: ModelVBAR, highest: bool = True) -> None:
        """Give a VBAR the highest or lowest priority."""
        others = [reference for reference in self._order if reference() not in (None, vbar)]
        own = weakref.ref(vbar)
        self._order = [*others, own] if highest else [own, *others]

    def deficit(self, size: int) -> int:
        """Bytes to free before `size` bytes can be allocated without using the headroom."""
        return size + self.headroom - self.memory.free

    def make_room(self, size: int) -> None:
        """Evict pages until `size` bytes and the headroom are free, as far as possible."""
        with self.lock:
            self.evict(self.deficit(size))

    def evict(self, size: int) -> None:
        """Evict `size` bytes, or all unpinned pages if these are fewer."""
        pages = -(-size // self.page)
        for vbar in self._alive():
            while pages > 0 and vbar.watermark > vbar.watermark_limit:
                pages -= vbar.lower_watermark()


class _Page:
    __slots__ = ("resident", "pins", "serial", "weights")

    def __init__(self) -> None:
        self.resident = False
        self.pins = 0
        self.serial = 0
        #: The weights in this page while it is resident.
        self.weights: list[CardTensor] = []


class ModelVBAR:
    """Address range for a model's weights, with the interface of `comfy_aimdo.model_vbar.ModelVBAR`.

    Attributes:
        max_size: size of the address range in bytes.
        offset: allocated bytes of the address range; addresses are never freed.
    """

    _bases = iter(range(1 << 44, 1 << 62, 1 << 44))

    def __init__(self, size: int, device: int) -> None:
        self.device = device
        self.max_size = int(size)
        self.offset = 0
        self.base_addr = next(self._bases)
        self.state = state(device)
        count = min(-(-self.max_size // self.state.page), self.state.memory.card.total // self.state.page)
        self._pages = [_Page() for _ in range(count)]
        self._weights: dict[int, CardTensor] = {}
        self.watermark = count
        self.watermark_limit = 0
        self.state.place(self)

    @property
    def pins(self) -> int:
        """Number of pins on all pages."""
        return sum(page.pins for page in self._pages)

    def prioritize(self, *_: int) -> None:
        with self.state.lock:
            self.state.place(self)
            self.watermark = len(self._pages)

    def deprioritize(self) -> None:
        with self.state.lock:
            self.state.place(self, highest=False)

    def alloc(self, num_bytes: int) -> Location:
        """Allocate addresses, aligned to 512 bytes.

        Raises:
            MemoryError: the address range is exhausted.
        """
        self.offset = -(-self.offset // 512) * 512
        if self.offset + num_bytes > self.max_size:
            raise MemoryError("VBAR OOM")
        address = self.base_addr + self.offset
        self.offset += num_bytes
        return self, address, num_bytes

    def fault(self, address: int, size: int) -> list[int] | None:
        """Load and pin pages.

        Returns:
            A signature that changes once a page has been evicted, or None if there is not enough memory.
        """
        with self.state.lock:
            self.state.faults += 1
            self.state.evict(self.state.deficit(0))
            span = self._span(address, size)
            missing = [] if span.stop > self.watermark else [n for n in span if not self._pages[n].resident]
            if missing or span.stop > self.watermark:
                self.state.misses += 1
                if not self._bring_in(span, missing):
                    self.state.refusals += 1
                    return None
            for number in span:
                self._pages[number].pins += 1
            return [self._pages[number].serial for number in span]

    def _bring_in(self, span: range, missing: list[int]) -> bool:
        page = self.state.page
        self._make_room(span, len(missing))
        for number in missing:
            if self.state.deficit(page) > 0:
                self.state.evict(page)
            if span.stop > self.watermark or self.state.memory.free < page:
                return False
            self.state.memory.hold(page)
            self._pages[number].resident = True
            self._pages[number].serial += 1
        return span.stop <= self.watermark

    def _make_room(self, span: range, missing: int) -> None:
        """Evict other models' pages, or own ones from the end, until all pages up to the span's end would fit."""
        surplus = -self.state.deficit(missing * self.state.page)
        others = sum(not page.resident for page in self._pages[: min(span.stop, self.watermark)]) - missing
        for vbar in self.state.vbars:
            while vbar.watermark > vbar.watermark_limit and surplus < max(others, 0) * self.state.page:
                freed = vbar.lower_watermark()
                surplus += self.state.page * freed
                if vbar is self and vbar.watermark < span.stop and not freed:
                    others -= 1

    def unpin(self, address: int, size: int) -> None:
        with self.state.lock:
            for number in self._span(address, size):
                if number >= len(self._pages):
                    return
                page = self._pages[number]
                page.pins = max(page.pins - 1, 0)
                if number >= self.watermark:
                    self._evict(number)

    def lower_watermark(self) -> int:
        """Evict the last page below the watermark. Returns 1 if this frees memory, 0 if it is absent or pinned."""
        self.watermark -= 1
        return int(self._evict(self.watermark))

    def _evict(self, number: int) -> bool:
        page = self._pages[number]
        if not page.resident or page.pins:
            return False
        self._drop(page)
        self.state.evictions += 1
        return True

    def _drop(self, page: _Page) -> None:
        page.resident = False
        self.state.memory.release(self.state.page)
        for weight in page.weights:
            weight.allocation.valid = False
        page.weights.clear()

    def loaded_size(self) -> int:
        return self.state.page * sum(page.resident for page in self._pages)

    def free_memory(self, size: int) -> int:
        freed = 0
        with self.state.lock:
            while freed < size and self.watermark > self.watermark_limit:
                freed += self.state.page * self.lower_watermark()
        return freed

    def set_watermark_limit(self, size: int) -> None:
        self.watermark_limit = -(-int(size) // self.state.page)

    def set_watermark(self, size: int) -> None:
        target = min(-(-int(size) // self.state.page), len(self._pages))
        with self.state.lock:
            while self.watermark > target:
                self.lower_watermark()
            self.watermark = target

    def tensor(self, address: int, size: int) -> CardTensor:
        """The memory at an address as uint8 [size], filled with NaN (in any floating-point dtype) after a miss.

        Raises:
            IllegalAccess: the page is not resident.
        """
        found = self._weights.get(address)
        if found is not None and found.allocation.valid and found.inner.numel() == size:
            return found
        pages = [self._pages[number] for number in self._span(address, size)]
        if not all(page.resident for page in pages):
            raise IllegalAccess("CUDA error: an illegal memory access was encountered (simulated card: no such page)")
        with torch._C.DisableTorchFunction():
            inner = torch.full((size,), 255, dtype=torch.uint8, device="meta" if machine.hollow else "cpu")
            found = CardTensor(inner, self.device, allocation_of(inner.untyped_storage(), None))
        self._weights[address] = found
        for page in pages:
            page.weights.append(found)
        return found

    def _span(self, address: int, size: int) -> range:
        offset = address - self.base_addr
        return range(offset // self.state.page, -(-(offset + size) // self.state.page))

    def __del__(self) -> None:
        for page in getattr(self, "_pages", ()):
            if page.resident:
                self._drop(page)


_states: dict[int, DynamicMemory] = {}


def state(index: int = 0) -> DynamicMemory:
    """Dynamic VRAM of a card.

    Raises:
        KeyError: dynamic VRAM is not installed.
    """
    return _states[index]


def states() -> list[DynamicMemory]:
    """Dynamic VRAM of all cards, empty if it is not installed."""
    return list(_states.values())


def _unpin(place: Location | None) -> None:
    if place is not None:
        vbar, address, size = place
        vbar.unpin(address, size)


def _analyze(device: int | None = None) -> int:
    return sum(vbar.loaded_size() for vbar in state(device or 0).vbars)


def _reset_watermark_limits() -> None:
    for dynamic in _states.values():
        for vbar in dynamic.vbars:
            vbar.watermark_limit = 0


def _init(
    implementation: str | None = None, simple_vram_headroom: int | None = None, nvml_pressure: bool = False
) -> bool:
    if simple_vram_headroom is not None:  # --reserve-vram
        for dynamic in _states.values():
            dynamic.headroom = simple_vram_headroom
    return True


def _init_devices(devices: Iterable[int | tuple[int, int]]) -> bool:
    pairs = [device if isinstance(device, tuple) else (device, 0) for device in devices]
    for index, extra in pairs:  # --vram-headroom
        state(index).headroom += extra
    return bool(pairs)


def install(headroom: int, page: int = PAGE) -> None:
    """Replace `comfy_aimdo`, whether it is installed or not."""
    for memory in machine.cards:
        dynamic = _states[memory.index] = DynamicMemory(memory, headroom, page)
        memory.make_room = dynamic.make_room

    def nothing(*_: object) -> None:
        return None

    levels = ("none", "critical", "error", "warning", "info", "detail", "debug", "verbose", "vverbose")
    package = sys.modules["comfy_aimdo"] = types.ModuleType("comfy_aimdo")
    package.__path__ = []  # type: ignore[attr-defined] - makes it a package
    for name, content in {
        "control": {
            "lib": object(),
            "init": _init,
            "init_devices": _init_devices,
            "init_device": lambda index, extra_vram_headroom=0: _init_devices([(index, extra_vram_headroom)]),
            "deinit": nothing,
            "analyze": nothing,
            "get_total_vram_usage": lambda: sum(memory.now for memory in machine.cards),
            **{f"set_log_{level}": nothing for level in levels},
        },
        "model_vbar": {
            "ModelVBAR": ModelVBAR,
            "vbar_fault": lambda place: place[0].fault(place[1], place[2]),
            "vbar_unpin": _unpin,
            "vbar_signature_compare": lambda a, b: a is not None and b is not None and a == b,
            "vbars_reset_watermark_limits": _reset_watermark_limits,
            "vbars_analyze": _analyze,
        },
        "torch": {
            "aimdo_to_tensor": lambda place, device: place[0].tensor(place[1], place[2]),
            "hostbuf_to_tensor": lambda buffer: buffer.tensor(),
            "get_torch_allocator": nothing,
        },
        **transfer.MODULES,
    }.items():
        module = sys.modules[f"comfy_aimdo.{name}"] = types.ModuleType(f"comfy_aimdo.{name}")
        module.__dict__.update(content)
        setattr(package, name, module)
