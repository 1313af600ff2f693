"""The command line that starts a ComfyUI on simulated cards."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Simulation:
    """Simulated cards for a ComfyUI process.

    Attributes:
        cards: number of cards.
        vram: GiB of memory per card.
        held: GiB of it used by other programs.
        dynamic: use dynamic VRAM, ComfyUI's default on NVIDIA cards.
        headroom: GiB that dynamic VRAM leaves free.
        page: page size of dynamic VRAM in MiB; small pages allow loading parts of a small model.
        hollow: tensors have shapes but no data.
        trace: log memory, for `trace.read`.
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
        """Command line that starts ComfyUI with these arguments, to be run in the pack's folder."""
        command = [sys.executable, "-m", "runner.simulated_card", "--host", str(host)]
        for name in ("cards", "vram", "held", "headroom", "page"):
            command += [f"--{name}", str(getattr(self, name))]
        command += [f"--{name}" for name in ("dynamic", "hollow", "trace") if getattr(self, name)]
        return [*command, "--", *arguments]
