"""Logs the memory of simulated cards before and after each node and each loading of models."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from . import dynamic
from .memory import machine

_MARK = "[simulated card] "
_attached = False


def attach() -> None:
    """Start logging, as soon as ComfyUI's modules are loaded."""
    global _attached
    if _attached or "execution" not in sys.modules:
        return
    _attached = True
    import comfy.model_management as management
    import execution

    load, run = management.load_models_gpu, execution.get_output_data

    def load_models_gpu(models: Sequence[Any], memory_required: float = 0, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        names = [type(getattr(model, "model", model)).__name__ for model in models]
        _record("before load", models=names, asked=int(memory_required))
        result = load(models, memory_required, *args, **kwargs)
        _record("after load", models=names, loaded=[int(model.loaded_size()) for model in models])
        return result

    async def get_output_data(prompt_id: str, node_id: str, node: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        name = node.__name__ if isinstance(node, type) else type(node).__name__
        _record("begin", node=name)
        running: Awaitable[Any] = run(prompt_id, node_id, node, *args, **kwargs)
        try:
            return await running
        finally:
            _record("end", node=name)

    management.load_models_gpu = load_models_gpu
    execution.get_output_data = get_output_data


def state() -> dict[str, Any]:
    """State of all cards, pinned memory and dynamic VRAM, serializable as JSON."""
    return {
        "cards": [
            {"now": memory.now, "peak": memory.peak, "to_card": memory.to_card, "to_host": memory.to_host}
            for memory in machine.cards
        ],
        "pinned": {"now": machine.pinned.now, "peak": machine.pinned.peak},
        "dynamic": [
            {
                "faults": one.faults,
                "misses": one.misses,
                "refusals": one.refusals,
                "evictions": one.evictions,
                "vbars": [
                    {"offset": vbar.offset, "size": vbar.max_size, "pins": vbar.pins, "loaded": vbar.loaded_size()}
                    for vbar in one.vbars
                ],
            }
            for one in dynamic.states()
        ],
    }


def _record(event: str, **details: Any) -> None:  # noqa: ANN401
    """Log one record, and reset the peaks for the next one."""
    logging.info("%s%s", _MARK, json.dumps({"event": event, **details, **state()}))
    for memory in machine.cards:
        memory.reset_peak()
    machine.pinned.reset_peak()


def read(log: str) -> list[dict[str, Any]]:
    """Parse the records in a log: `event` (begin, end, before load, after load), its details, and `state()`."""
    start: Callable[[str], int] = lambda line: line.index(_MARK) + len(_MARK)  # noqa: E731
    return [json.loads(line[start(line) :]) for line in log.splitlines() if _MARK in line]
