"""Starts ComfyUI on simulated cards. Run it with ComfyUI's Python, in the pack's folder.

python -m runner.simulated_card --host DIR --dynamic -- --listen 127.0.0.1 --port 8188
"""

from __future__ import annotations

import argparse
import os
import runpy
import sys
from pathlib import Path

from . import DEFAULT_CARDS, Card, install, trace
from .functions import activate_threads, active
from .memory import GIB, MIB


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m runner.simulated_card",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--host", type=Path, required=True, help="the ComfyUI folder")
    parser.add_argument("--cards", type=int, default=1, help="number of cards (default: 1)")
    parser.add_argument(
        "--vram", type=float, default=DEFAULT_CARDS[0].total / GIB, help="GiB of each card (default: 24)"
    )
    parser.add_argument("--held", type=float, default=0, help="GiB of it used by other programs (default: 0)")
    parser.add_argument("--dynamic", action="store_true", help="use dynamic VRAM")
    parser.add_argument("--headroom", type=float, default=0.5, help="GiB that dynamic VRAM leaves free (default: 0.5)")
    parser.add_argument("--page", type=float, default=32, help="page size of dynamic VRAM in MiB (default: 32)")
    parser.add_argument("--hollow", action="store_true", help="tensors have shapes but no data")
    parser.add_argument("--trace", action="store_true", help="log memory before and after each node")
    parser.add_argument("arguments", nargs="*", metavar="-- ARGUMENT", help="arguments of ComfyUI")
    options = parser.parse_args()
    card = Card(int(options.vram * GIB), int(options.held * GIB))
    install(
        [card] * options.cards, options.hollow, options.dynamic, int(options.headroom * GIB), int(options.page * MIB)
    )
    activate_threads(trace.attach if options.trace else None)
    host = options.host.resolve()
    os.chdir(host)
    sys.path[0] = str(host)  # instead of the pack's folder, whose `nodes` would hide ComfyUI's
    sys.argv = ["main.py", *options.arguments, *([] if options.dynamic else ["--disable-dynamic-vram"])]
    with active():
        runpy.run_path(str(host / "main.py"), run_name="__main__")


if __name__ == "__main__":
    main()
