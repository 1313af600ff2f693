"""Table, plots and contact sheet of `bench method`."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from .method_measures import MEASURES


def markdown(table: list[dict], titles: dict[str, str], own_length: dict[str, dict[str, float]] | None = None) -> str:
    """The table with 95% intervals, in Markdown.

    Args:
        table: rows with their metrics.
        titles: titles of the rows, by name.
        own_length: measures of the base at its native length.
    """
    names = list(MEASURES)
    lines = [
        "| row | clips | " + " | ".join(name.replace("_", " ") for name in names) + " |",
        "| --- | --- | " + " | ".join("---" for _ in names) + " |",
    ]
    for row in table:
        cells = [_cell(row["metric"][name]) for name in names]
        lines.append(f"| {titles[row['row']]} | {row['clips']} | " + " | ".join(cells) + " |")
    if own_length is not None:
        cells = [f"{name.replace('_', ' ')} {_cell(value)}" for name, value in own_length.items()]
        lines += ["", f"The base at its native 25 frames: {', '.join(cells)}."]
    lines.append("")
    for name, (text, perfect) in MEASURES.items():
        lines.append(f"- *{name.replace('_', ' ')}*: {text}; {perfect:g} is perfect.")
    equal = [name for name in names if _all_overlap([row["metric"][name] for row in table if row["row"] != "truth"])]
    if equal:
        overlapping = ", ".join(equal).replace("_", " ")
        lines += ["", f"The intervals of all rows overlap for {overlapping}, which does not distinguish them."]
    return "\n".join(lines) + "\n"


def _cell(value: dict[str, float]) -> str:
    return f"{value['mean']:.3f} ({value['low']:.3f} to {value['high']:.3f})"


def _all_overlap(values: list[dict[str, float]]) -> bool:
    return max(value["low"] for value in values) <= min(value["high"] for value in values)


def _figure(width: float, height: float):  # noqa: ANN202
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def paths(by_frame: dict[str, np.ndarray], titles: dict[str, str], target: Path) -> None:
    """Plot the path error by frame: mean over videos, with its 95% interval."""
    figure = _figure(9, 5)
    axes = figure.subplots()
    for name, errors in by_frame.items():
        mean, half = errors.mean(0), 1.96 * errors.std(0) / np.sqrt(len(errors))
        style = {"color": "black"} if name == "truth" else {"linestyle": "-" if name in _MAIN else "--"}
        (line,) = axes.plot(mean, label=titles[name], **style)
        axes.fill_between(range(len(mean)), mean - half, mean + half, color=line.get_color(), alpha=0.12, linewidth=0)
    axes.axvline(24.5, color="grey", linewidth=0.8, linestyle=":")
    axes.annotate("native length of the base", (25.5, axes.get_ylim()[1] * 0.97), color="grey", fontsize=8, va="top")
    axes.set(xlabel="frame", ylabel="distance from the true path (image widths)", ylim=(0, None))
    figure.legend(fontsize=8, loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(target, dpi=120)


_MAIN = ("base", "untrained", "extended", "windows")


def curve(rows: list[dict], target: Path) -> None:
    """Plot the errors after one denoising step by noise level: squared error of latents, and path error."""
    figure = _figure(10, 4)
    labels = {"mse": "squared error of latents", "path_error": "path error (image widths)"}
    for axes, (key, label) in zip(figure.subplots(1, 2), labels.items(), strict=True):
        for row in rows:
            levels = row["levels"]
            means = [level[key]["mean"] for level in levels]
            axes.plot([level["sigma"] for level in levels], means, "o-", label=row["row"])
        axes.set(xscale="log", yscale="log", xlabel="noise level sigma", ylabel=label)
    figure.axes[0].set_ylim(bottom=1e-4)  # errors of the ideal rows are almost 0 at low noise
    figure.axes[0].legend(fontsize=8)
    figure.savefig(target, dpi=120)


def contact_sheet(videos: dict[str, np.ndarray], target: Path, every: int = 12) -> None:
    """Draw frames of the same clip for every row."""
    shown = range(0, 128, every)
    figure = _figure(len(shown) * 1.0, len(videos) * 1.3)
    for part, (title, video) in zip(figure.subfigures(len(videos), 1), videos.items(), strict=True):
        part.suptitle(title, fontsize=7, x=0.01, ha="left")
        for axis, frame in zip(part.subplots(1, len(shown)), shown, strict=True):
            axis.imshow(video[frame])
            axis.set_axis_off()
            axis.set_title(str(frame), fontsize=6, pad=1)
    figure.savefig(target, dpi=130)
