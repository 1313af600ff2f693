"""Runs the stages of one video on one hollow simulated card, for `benchmarks.cards`. Prints them as JSON."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from dataclasses import asdict
from pathlib import Path

from runner import simulated_card

GIB = 2**30


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--total-gb", type=float, required=True, help="memory of the card")
    parser.add_argument("--held-gb", type=float, required=True, help="memory used by other programs")
    parser.add_argument("--size", type=int, nargs=2, required=True, metavar=("WIDTH", "HEIGHT"))
    parser.add_argument("--frames", type=int, required=True)
    parser.add_argument("--loading", choices=["static", "dynamic"], required=True)
    parser.add_argument("--files", type=Path, required=True, help="folder with the hollow checkpoint and extension")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    dynamic = options.loading == "dynamic"
    card = simulated_card.Card(int(options.total_gb * GIB), int(options.held_gb * GIB))
    simulated_card.install([card], hollow=True, dynamic=dynamic)
    with simulated_card.active():
        rows = _run(options, dynamic)
    print(json.dumps(rows))
    return 0


def _run(options: argparse.Namespace, dynamic: bool) -> list[dict[str, object]]:
    from . import in_process

    in_process.set_up(dynamic)
    from . import model_files, stages

    video = stages.Video(*options.size, options.frames)
    run = stages.Run(model_files.files(options.files, "hollow"), video, SimulatedMeter(), first_segment_only=True)
    rows = []
    for stage, name, settings in run.stages():
        for setting in settings:
            row = run.measure(stage, name, setting)
            rows.append({"stage": name, "fits": row.fits, **asdict(row)})
            logging.info("%s, %s: %s %s", name, setting.name, row.error or "fits", row.figures)
            if row.fits:
                break
    return rows


class SimulatedMeter:
    """Measures a simulated card's memory."""

    def __init__(self) -> None:
        self._memory = simulated_card.memory(0)

    def begin(self) -> None:
        """Reset the peak."""
        self._memory.reset_peak()

    def read(self) -> dict[str, float]:
        """Peak since `begin` in GiB."""
        return {"peak_gib": self._memory.peak / GIB}

    def copied(self) -> int:
        """Bytes copied to the card so far."""
        return self._memory.to_card


if __name__ == "__main__":
    sys.exit(main())
