"""Draws the plots of a benchmark's JSON, in an environment that has matplotlib: ComfyUI's need not have it."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from .report import RESULTS


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=["growth", "memory"])
    name = parser.parse_args().name
    import matplotlib

    matplotlib.use("Agg")
    {"growth": growth, "memory": memory}[name]()
    return 0


def _results(stem: str) -> dict[Path, list[dict[str, Any]]]:
    """Rows of the JSON files of that name, of a CPU and of a GPU, by the plot to draw of them."""
    files = [RESULTS / f"{stem}.json", RESULTS / f"{stem}_cuda.json"]
    return {file.with_suffix(".png"): json.loads(file.read_text("utf-8"))["rows"] for file in files if file.exists()}


def growth() -> None:
    from matplotlib import pyplot

    panels = {"seconds": "seconds a call", "peak_mib": "MiB over the weights"}
    for target, rows in _results("growth").items():
        figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
        for axis, (name, title) in zip(axes, panels.items(), strict=True):
            axis.plot([row["frames"] for row in rows], [row[name] for row in rows], marker="o", label="measured")
            ends = [0, rows[-1]["frames"]], [0, rows[-1][name]]
            axis.plot(*ends, color="grey", linestyle=":", label="in proportion")
            axis.set_xlabel("frames")
            axis.set_title(title)
            axis.set_ylim(bottom=0)
            axis.legend(frameon=False)
        figure.savefig(target, dpi=110)
        pyplot.close(figure)


def memory() -> None:
    from matplotlib import pyplot

    for target, rows in _results("memory_counted").items():
        pictures = list(dict.fromkeys(row["picture"] for row in rows))
        figure, axes = pyplot.subplots(1, len(pictures), figsize=(9, 3), layout="constrained")
        for axis, picture in zip(axes, pictures, strict=True):
            shown = [row for row in rows if row["picture"] == picture][::-1]
            bars = axis.barh([row["who"] for row in shown], [row["peak_gib"] for row in shown])
            axis.bar_label(bars, fmt="%.1f", padding=3)
            axis.set_title(f"{picture}, {shown[0]['frames']} frames")
            axis.set_xlabel("GiB beside the weights")
            axis.margins(x=0.15)
            axis.spines[["top", "right"]].set_visible(False)
        figure.savefig(target, dpi=110)
        pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
