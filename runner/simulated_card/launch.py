"""The command line that starts a ComfyUI on simulated cards."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Simulation:
    """Cards for a ComfyUI of its own process.

    Attributes:
        cards: how many.
        vram: GiB of memory of each.
        held: GiB of it that others hold.
        dynamic: with dynamic VRAM, as ComfyUI has it on NVIDIA cards.
        headroom: GiB that dynamic VRAM leaves free.
        page: MiB of a page of dynamic VRAM; small ones let a part of a small model in.
        hollow: tensors have sizes and no numbers.
        trace: write memory to the log, for `trace.read`.
    """

    cards: int = 1
    vram: float = 24
    held: float = 0
    dynamic: bool = False
    headroom: float = 0.5
    page: float = 32
    hollow: bool = False
    trace: bool = True

    def command(self, host: Path, arguments: Sequence[str]) -> list[str]:
        """What to run, in the pack's folder, for a host's main.py with these arguments."""
        command = [sys.executable, "-m", "runner.simulated_card", "--host", str(host)]
        for name in ("cards", "vram", "held", "headroom", "page"):
            command += [f"--{name}", str(getattr(self, name))]
        command += [f"--{name}" for name in ("dynamic", "hollow", "trace") if getattr(self, name)]
        return [*command, "--", *arguments]
