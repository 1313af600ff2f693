"""Memory of a call with other nodes' patches, compared to the estimate that is reported to ComfyUI.

    python run.py bench patches [--frames 128] [--size 64] [--chunk-megabytes 128]

Counted as in `bench memory`: peak bytes of live tensors during a full-size call in fp16, without weights. Reported is
the estimate with which ComfyUI frees memory. If less is reported than needed, ComfyUI keeps too many weights on the
card, and the run can fail with an out-of-memory error.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable
from typing import Any

from . import report
from .memory import GIB, count


def main() -> int:
    parser = argparse.ArgumentParser(prog="run.py bench patches", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--frames", type=int, default=128)
    parser.add_argument("--size", type=int, default=64, help="height and width of the latents")
    parser.add_argument("--chunk-megabytes", type=int, default=128)
    options = parser.parse_args()
    from . import unets  # noqa: F401 - adds ComfyUI to the path

    rows = []
    for name, change, conditions in _cases():
        for offload in (False, True):
            changed: list[Any] = []

            def note(model: Any, change: Any = change, changed: list[Any] = changed) -> Any:  # noqa: ANN401
                changed.append(change(model))
                return changed[0]

            needed = count("ours", options.frames, options.size, options.chunk_megabytes, offload, note, conditions)
            reported = _reported(changed[0], [options.frames, 4, options.size, options.size], conditions)
            place = "in RAM" if offload else "on the card"
            row = {"patch": name, "skips": place, "conditions": conditions, "needed_gib": needed / GIB,
                   "told_gib": reported / GIB, "told_to_needed": reported / needed}  # fmt: skip
            rows.append(row)
            print(row, flush=True)
    report.write("patches", rows)
    return 0


def _cases() -> list[tuple[str, Callable[[Any], Any], int]]:
    """(name, function that patches a model, number of conditions in a batch)."""

    def comfy_node(file: str, name: str, **inputs: Any) -> Callable[[Any], Any]:  # noqa: ANN401
        node = getattr(importlib.import_module(f"comfy_extras.{file}"), name)
        function = node.execute if hasattr(node, "execute") else getattr(node(), node.FUNCTION)
        return lambda model: function(model=model, **inputs)[0]

    def unknown_patch(model: Any) -> Any:  # noqa: ANN401
        changed = model.clone()
        changed.set_model_attn1_output_patch(lambda out, options: out)
        return changed

    def one_block(model: Any) -> Any:  # noqa: ANN401
        changed = model.clone()
        changed.set_model_attn1_replace(lambda q, k, v, options: v, "middle", 0)
        return changed

    return [
        ("none", lambda model: model, 1),
        ("NAGuidance", comfy_node("nodes_nag", "NAGuidance", nag_scale=5.0, nag_alpha=0.5, nag_tau=1.5), 2),
        ("HyperTile", comfy_node("nodes_hypertile", "HyperTile", tile_size=256, swap_size=1, max_depth=0,
                              scale_depth=False), 1),
        ("FreeU_V2", comfy_node("nodes_freelunch", "FreeU_V2", b1=1.3, b2=1.4, s1=0.9, s2=0.2), 1),
        ("attention replaced in the middle block", one_block, 1),
        ("another pack's attention patch", unknown_patch, 1),
    ]  # fmt: skip


def _reported(model: Any, shape: list[int], conditions: int) -> float:  # noqa: ANN401 - ComfyUI's
    """Bytes that are reported to ComfyUI for sampling latents of a shape."""
    from comfy.patcher_extension import WrappersMP

    def ask(patcher: Any, noise_shape: list[int], *_: Any, **__: Any) -> float:  # noqa: ANN401
        return patcher.model.memory_required([conditions * noise_shape[0], *noise_shape[1:]])

    (wrapper,) = model.get_wrappers(WrappersMP.PREPARE_SAMPLING, "exvideo")
    return wrapper(ask, model, shape, {}, model_options=model.model_options)


if __name__ == "__main__":
    sys.exit(main())
