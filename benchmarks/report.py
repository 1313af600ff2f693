"""Where figures go: JSON with the command and machine that made them, and a table in Markdown."""

from __future__ import annotations

import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(os.environ.get("EXVIDEO_RESULTS") or Path(__file__).resolve().parent / "results")


def machine() -> str:
    """What the figures were made on."""
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
    return " ".join(["python run.py bench", Path(sys.argv[0]).stem, *sys.argv[1:]])


def write(name: str, rows: list[dict[str, Any]], details: list[dict[str, Any]] | None = None, after: str = "") -> None:
    """Write `name`.json and `name`.md, or `name`_cuda.* on a GPU: neither machine's figures replace the other's.

    Args:
        details: more rows, for the JSON only.
        after: Markdown beneath the table.
    """
    RESULTS.mkdir(parents=True, exist_ok=True)
    stem = f"{name}_cuda" if torch.cuda.is_available() else name
    found = {"command": command(), "machine": machine(), "rows": rows}
    if details is not None:
        found["details"] = details
    (RESULTS / f"{stem}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (RESULTS / f"{stem}.md").write_text(markdown(rows) + after + f"\n`{command()}`, on {machine()}\n", encoding="utf-8")


def markdown(rows: list[dict[str, Any]]) -> str:
    columns = list(rows[0])
    lines = ["| " + " | ".join(column.replace("_", " ") for column in columns) + " |", "| --- " * len(columns) + "|"]
    lines += ["| " + " | ".join(_text(row[column]) for column in columns) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _text(value: Any) -> str:  # noqa: ANN401 - any figure
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, dict):  # a mean and its 95 % interval
        return f"{value['mean']:.3g} ({value['low']:.2g} to {value['high']:.2g})"
    if isinstance(value, list):
        return " to ".join(_text(part) for part in value)
    return str(value)
