"""Work of one full-size UNet call on a card, counted without computing.

    python run.py bench work [--frames 128] [--size 64] [--chunk-megabytes 128 512] [--by-operator 12]

Counts floating-point operations (two per multiply-add), bytes that operators read and write, and operator calls, in
fp16 with one condition, for this pack, the reference and a plain port to ComfyUI, using PyTorch's fake tensors on a
CUDA device. Caches are not modeled: data that one operator writes and the next one reads counts twice. Layout
conversions are an estimate of what PyTorch and cuDNN additionally read and write to compute convolutions in channels
last.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch

from . import report
from .counted_work import ATTENTION, CONVOLUTION, LINEAR, CardKernels, Work

TERA, GIB = 1e12, 2**30
CARD = torch.device("cuda:0")


def main() -> int:
    parser = argparse.ArgumentParser(prog="run.py bench work", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--frames", type=int, default=128)
    parser.add_argument("--size", type=int, default=64, help="height and width of the latents")
    parser.add_argument("--chunk-megabytes", type=int, nargs="+", default=[128, 512], help="chunk sizes of this pack")
    parser.add_argument("--by-operator", type=int, default=12, help="number of operators to list (0: none)")
    options = parser.parse_args()
    makers = [("ours", size) for size in options.chunk_megabytes] + [("reference", 0), ("plain port", 0)]
    rows, operators = [], []
    for maker, megabytes in makers:
        name = f"{maker}, chunks of {megabytes} MiB" if megabytes else maker
        work = count(maker, options.frames, options.size, megabytes)
        rows.append({"who": name, **_figures(work)})
        operators += [{"who": name, **row} for row in _by_operator(work, options.by_operator)]
    print(report.markdown(rows))
    report.write("work", rows)
    if operators:
        print(report.markdown(operators))
        report.write("work_operators", operators)
    return 0


def _figures(work: Work) -> dict[str, Any]:
    kinds = {f"{kind}_tflop": work.by_kind[kind] / TERA for kind in (CONVOLUTION, LINEAR, ATTENTION)}
    total = work.total
    return {"tflop": total.operations / TERA, **kinds, "gib_moved": total.moved / GIB, "gib_layout": work.layout / GIB,
            "calls": total.calls}  # fmt: skip


def _by_operator(work: Work, limit: int) -> list[dict[str, Any]]:
    """The operators that read and write most."""
    ordered = sorted(work.by_operator.items(), key=lambda item: -item[1].moved)
    return [
        {"operator": name, "calls": total.calls, "gib_read": total.read / GIB, "gib_written": total.written / GIB}
        for name, total in ordered[:limit]
    ]


def count(maker: str, frames: int, size: int, chunk_megabytes: int) -> Work:
    """Count the work of one call.

    Args:
        maker: "ours", "reference" or "plain port".
        frames: number of frames.
        size: height and width of the latents.
        chunk_megabytes: setting of ExVideo Memory, for "ours".
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    from . import unets

    with FakeTensorMode(allow_non_fake_inputs=True), _on_card(unets):
        shapes = unets.shapes("full", frames)
        base, extension = (
            {name: torch.empty(shape, dtype=torch.float16, device=CARD) for name, shape in part.items()}
            for part in shapes
        )
        weights = unets.Weights("full", base, extension)
        sample = torch.empty(frames, 8, size, size, dtype=torch.float16, device=CARD)
        context = torch.empty(1, 1, unets.CONTEXT, dtype=torch.float16, device=CARD)
        inputs = unets.Inputs(sample, context, torch.empty(1, 3, device=CARD))
        call: Callable[[], Any]
        if maker == "reference":
            unet = unets.theirs(weights)
            call = lambda: unets.call_theirs(unet, inputs)  # noqa: E731
        else:
            patched = unets.ours(weights, maker == "plain port", chunk_megabytes, fake=True)
            embedded = torch.empty(1, 768, dtype=torch.float16, device=CARD)
            call = lambda: unets.call_ours(patched, inputs, embedded)  # noqa: E731
        work = Work()
        with work, CardKernels(work):
            call()
    return work


def _on_card(unets: Any) -> Any:  # noqa: ANN401 - a module; a context
    return mock.patch.object(unets.comfy.model_management, "get_torch_device", lambda: CARD)


if __name__ == "__main__":
    sys.exit(main())
