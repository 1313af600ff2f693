"""Draws the plots of a benchmark from its JSON file, in an environment with matplotlib, which ComfyUI may lack."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from .report import RESULTS


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=["growth", "memory", "steps"])
    name = parser.parse_args().name
    import matplotlib

    matplotlib.use("Agg")
    {"growth": growth, "memory": memory, "steps": steps}[name]()
    return 0


def _results(stem: str) -> dict[Path, list[dict[str, Any]]]:
    """Rows of the results on a CPU and on a GPU, by the path of their plot."""
    files = [RESULTS / f"{stem}.json", RESULTS / f"{stem}_cuda.json"]
    return {file.with_suffix(".png"): json.loads(file.read_text("utf-8"))["rows"] for file in files if file.exists()}


def growth() -> None:
    """Plot `bench growth`."""
    from matplotlib import pyplot

    panels = {"seconds": "seconds per call", "peak_mib": "MiB, without weights"}
    for target, rows in _results("growth").items():
        figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
        for axis, (name, title) in zip(axes, panels.items(), strict=True):
            axis.plot([row["frames"] for row in rows], [row[name] for row in rows], marker="o", label="measured")
            ends = [0, rows[-1]["frames"]], [0, rows[-1][name]]
            axis.plot(*ends, color="grey", linestyle=":", label="proportional")
            axis.set_xlabel("frames")
            axis.set_title(title)
            axis.set_ylim(bottom=0)
            axis.legend(frameon=False)
        figure.savefig(target, dpi=110)
        pyplot.close(figure)


def memory() -> None:
    """Plot `bench memory`."""
    from matplotlib import pyplot

    for target, rows in _results("memory_counted").items():
        sizes = list(dict.fromkeys(row["picture"] for row in rows))
        figure, axes = pyplot.subplots(1, len(sizes), figsize=(9, 3), layout="constrained")
        for axis, size in zip(axes, sizes, strict=True):
            shown = [row for row in rows if row["picture"] == size][::-1]
            bars = axis.barh([row["who"] for row in shown], [row["peak_gib"] for row in shown])
            axis.bar_label(bars, fmt="%.1f", padding=3)
            axis.set_title(f"{size}, {shown[0]['frames']} frames")
            axis.set_xlabel("GiB, without weights")
            axis.margins(x=0.15)
            axis.spines[["top", "right"]].set_visible(False)
        figure.savefig(target, dpi=110)
        pyplot.close(figure)


def steps() -> None:
    """Plot `bench steps`: quality over calls of the UNet, with the interval of the exact row as a band.

    Fréchet distances depend on the number of videos, and are shown only for rows with as many as the exact one.
    """
    from matplotlib import pyplot

    panels = {"presence": "intact shapes", "path_error": "path error (image widths)", "frechet": "Fréchet distance"}
    styles = {"exact": "ks", "undistilled": "C0o-", "fast": "C7.", "few-step": "D-"}
    for target, rows in _results("steps").items():
        exact = next((row for row in rows if row["kind"] == "exact"), None)
        if exact is None:  # only some rows were measured
            continue
        lines: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for row in rows:
            model = row["row"].rpartition(", ")[0] if row["kind"] == "few-step" else row["kind"]
            lines.setdefault((row["kind"], model), []).append(row)
        figure, axes = pyplot.subplots(1, len(panels), figsize=(12, 3.8), layout="constrained")
        for axis, (name, title) in zip(axes, panels.items(), strict=True):
            colors = iter(["C3", "C1", "C2", "C4", "C5"])
            for (kind, model), of_line in lines.items():
                style = next(colors) + styles[kind] if kind == "few-step" else styles[kind]
                shown = sorted((row["calls"], row["metric"][name]["mean"]) for row in of_line
                               if name != "frechet" or row["clips"] == exact["clips"])  # fmt: skip
                if shown:
                    axis.plot(*zip(*shown, strict=True), style, label=model, markersize=4)
            band = exact["metric"][name]
            axis.axhspan(band["low"], band["high"], color="grey", alpha=0.25, linewidth=0)
            axis.set(xscale="log", xlabel="calls of the UNet", title=title)
            if name == "path_error":
                axis.set_yscale("log")
        axes[0].legend(frameon=False, fontsize=8)
        figure.savefig(target, dpi=110)
        pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
