"""Writes results as JSON, with their command and machine, and as a table in Markdown."""

from __future__ import annotations

import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(os.environ.get("EXVIDEO_RESULTS") or Path(__file__).resolve().parent / "results")
#: Headings of columns whose key is not clear enough.
_HEADINGS = {
    "who": "implementation",
    "picture": "size",
    "way": "method",
    "skips": "skip connections",
    "latents": "latent size",
    "copied_a_call_gib": "copied per call (GiB)",
    "unet_on_card_gib": "UNet on card (GiB)",
    "unet_gib": "UNet (GiB)",
    "tflop": "TFLOP",
    "told_gib": "reported (GiB)",
    "told_to_needed": "reported / needed",
    "of_none": "relative to none",
    "pictures_per_second": "images per second",
    "loaded_though_spoiled": "loaded despite corruption",
    "left_something": "left files",
    "joint": "transition",
    "of_largest_own_step": "relative to the largest step",
    "left_open": "control",
    "each": "each video",
    "path_error_128": "path error, first 128 frames",
    "gib_moved": "read and written (GiB)",
    "gib_layout": "layout conversions (GiB)",
    "gib_read": "read (GiB)",
    "gib_written": "written (GiB)",
    "rss_before_mib": "resident before (MiB)",
    "MiB_after_a_sixth": "MiB after a sixth of the prompts",
    "MiB_more_every_100_prompts": "MiB added per 100 prompts",
    "MiB_of_history": "MiB of history",
}
_UNITS = {"gib": "GiB", "mib": "MiB", "gb": "GB", "tflop": "TFLOP", "s": "s"}


def machine() -> str:
    """Description of this machine."""
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        device = f"{_processor()}, {torch.get_num_threads()} threads of {os.cpu_count()}"
    return f"{device}, {platform.system()}, Python {platform.python_version()}, torch {torch.__version__}"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def command() -> str:
    """The command line of this benchmark."""
    return " ".join(["python run.py bench", Path(sys.argv[0]).stem, *sys.argv[1:]])


def write(
    name: str,
    rows: list[dict[str, Any]],
    details: list[dict[str, Any]] | None = None,
    after: str = "",
    table: list[dict[str, Any]] | None = None,
) -> None:
    """Write `name`.json and `name`.md, or `name`_cuda.* on a GPU, so that both results are kept.

    Args:
        name: name of the files.
        rows: rows of the table; the keys of the first one are its columns.
        details: additional rows, for the JSON file only.
        after: Markdown below the table.
        table: rows of the table, if they are not `rows`.
    """
    RESULTS.mkdir(parents=True, exist_ok=True)
    stem = f"{name}_cuda" if torch.cuda.is_available() else name
    found = {"command": command(), "machine": machine(), "rows": rows}
    if details is not None:
        found["details"] = details
    (RESULTS / f"{stem}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (RESULTS / f"{stem}.md").write_text(
        markdown(table or rows) + after + f"\n`{command()}`, on {machine()}\n", encoding="utf-8"
    )


def markdown(rows: list[dict[str, Any]]) -> str:
    """A table of rows in Markdown."""
    columns = list(rows[0])
    lines = ["| " + " | ".join(_heading(column) for column in columns) + " |", "| --- " * len(columns) + "|"]
    lines += ["| " + " | ".join(_text(row[column]) for column in columns) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _heading(column: str) -> str:
    if column in _HEADINGS:
        return _HEADINGS[column]
    name, _, unit = column.rpartition("_")
    return f"{name} ({_UNITS[unit]})".replace("_", " ") if name and unit in _UNITS else column.replace("_", " ")


def _text(value: Any) -> str:  # noqa: ANN401 - any figure
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, dict):  # a mean and its 95% interval
        return f"{value['mean']:.3g} ({value['low']:.2g} to {value['high']:.2g})"
    if isinstance(value, list):
        return (" to " if len(value) == 2 else ", ").join(_text(part) for part in value)  # noqa: PLR2004 - a range
    return str(value)
