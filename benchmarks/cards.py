"""Which videos fit on which card: every stage of a 128-frame video at full size, on simulated cards or a real one.

    python run.py bench cards [--cards 6 8 12 16 24] [--sizes 512x512 576x1024 1024x1024] [--loading static dynamic]
    python run.py bench cards --real [--minutes 4] [--vram 8] [--small]

Simulated cards have tensors with shapes but no data; ComfyUI decides what to load just as on real cards. All tensors
are counted, but not the CUDA context, library workspaces and allocator fragmentation; a desktop uses 0.8 GB. Each video
runs in a separate process: conditioning, one sampler step with two conditions, and one decoded segment (saving to a
file decodes with the same function). Stages that do not fit are tried again with settings that need less memory: skip
connections in RAM, smaller chunks or segments, tiles.
With --real: seconds and memory on this machine's CUDA card with random weights, compared to the reference and a plain
port. Results are written after each stage.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

from . import model_files, report

CARDS = (6, 8, 12, 16, 24)
SIZES = ("512x512", "576x1024", "1024x1024")
LOADING = ("dynamic", "static")
CONDITION, SAMPLE, DECODE = "conditioning", "sampling", "decode"
UNET = "SVD_img2vid"


def main() -> int:
    if "--real" in sys.argv:
        from . import real_card

        return real_card.main([argument for argument in sys.argv[1:] if argument != "--real"])
    parser = argparse.ArgumentParser(prog="run.py bench cards", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--frames", type=int, default=128)
    parser.add_argument("--cards", type=float, nargs="+", default=CARDS, metavar="GB", help="memory of each card")
    parser.add_argument("--held", type=float, default=0.8, metavar="GB", help="memory used by the desktop")
    parser.add_argument("--sizes", nargs="+", default=SIZES, metavar="WIDTHxHEIGHT")
    parser.add_argument("--loading", nargs="+", choices=LOADING, default=LOADING)
    parser.add_argument("--jobs", type=int, default=2, help="number of parallel processes")
    parser.add_argument("--real", action="store_true", help="use this machine's card (add --help for its options)")
    options = parser.parse_args()
    configurations = list(product(options.sizes, options.cards, options.loading))
    with tempfile.TemporaryDirectory(prefix="exvideo-cards-") as folder, ThreadPoolExecutor(options.jobs) as pool:
        model_files.make(Path(folder), "hollow")
        found = list(pool.map(lambda configuration: _run(options, folder, *configuration), configurations))
    details = [row for rows in found for row in rows]
    rows = [_summary(rows) for rows in found]
    report.write("cards", rows, details=details, after=_overview(rows, options.frames))
    print(_overview(rows, options.frames))
    return 0


def _run(options: argparse.Namespace, folder: str, size: str, card: float, loading: str) -> list[dict[str, Any]]:
    """Run the stages of one video on one card."""
    began = time.monotonic()
    arguments = [
        "--total-gb", str(card), "--held-gb", str(options.held), "--size", *size.split("x"), "--frames",
        str(options.frames), "--loading", loading, "--files", folder,
    ]  # fmt: skip
    done = subprocess.run([sys.executable, "-m", "benchmarks.card_run", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{size} on {card} GB, {loading}:\n{done.stderr[-3000:]}")
    rows = json.loads(done.stdout.splitlines()[-1])
    print(f"{size}, {card:g} GB, {loading} ({time.monotonic() - began:.0f} s)", flush=True)
    for row in rows:
        outcome = row["error"] or f"{row['figures']['peak_gib']:.2f} GiB"
        print(f"  {row['stage']}, {row['setting']}: {outcome}", flush=True)
    return [{"size": size, "card_gb": card, "loading": loading, **row} for row in rows]


def _summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Row of the table: the last attempt of each stage."""
    last = {row["stage"]: row for row in rows}
    sample = last[SAMPLE]
    on_card, total = sample["weights"].get(UNET, (0.0, 0.0))
    return {
        **{key: rows[0][key] for key in ("size", "card_gb", "loading")},
        "fits": all(row["fits"] for row in last.values()),
        "sampling": sample["setting"] if sample["fits"] else "does not fit",
        "decoding": last[DECODE]["setting"] if last[DECODE]["fits"] else "does not fit",
        **{f"{stage}_gib": last[stage]["figures"]["peak_gib"] for stage in (CONDITION, SAMPLE, DECODE)},
        "unet_on_card_gib": on_card,
        "unet_gib": total,
        "copied_a_call_gib": sample["figures"].get("call_copied_gib", 0.0),
    }


def _overview(rows: list[dict[str, Any]], frames: int) -> str:
    """Tables of the required settings by size and card, one per loading mode."""
    text = ""
    cards = sorted({row["card_gb"] for row in rows})
    for loading in dict.fromkeys(row["loading"] for row in rows):
        text += f"\n| {frames} frames, {loading} loading | " + " | ".join(f"{card:g} GB" for card in cards) + " |\n"
        text += "| --- " * (len(cards) + 1) + "|\n"
        for size in dict.fromkeys(row["size"] for row in rows):
            cells = {row["card_gb"]: _cell(row) for row in rows if (row["size"], row["loading"]) == (size, loading)}
            text += f"| {size} | " + " | ".join(cells.get(card, "") for card in cards) + " |\n"
    return text


def _cell(row: dict[str, Any]) -> str:
    if not row["fits"]:
        return "no"
    settings = [row["sampling"], *([f"decode in {row['decoding']}"] if row["decoding"] != "defaults" else [])]
    return ", ".join(settings)


if __name__ == "__main__":
    sys.exit(main())
