"""Reports on a run: progress bar, TensorBoard, a table and plot of the loss, and sample videos."""

from __future__ import annotations

import csv
import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING

from .config import Config
from .samples import write_atomically
from .videos import Video, read_window, write_video

if TYPE_CHECKING:
    from ..diffusers.checkpoint import SVD

_COLUMNS = ("step", "error", "loss", "gradient_norm", "learning_rate")
_log = logging.getLogger(__name__)


class Report:
    """Reports on a run, in the main process only.

    Args:
        out: output folder of the run.
        config: settings of the run.
        step: step at which the run starts or resumes; later rows of the table (`figures.csv`) are dropped.
    """

    def __init__(self, out: Path, config: Config, step: int) -> None:
        from tqdm import tqdm

        out.mkdir(parents=True, exist_ok=True)
        self.out = out
        self.config = config
        self.table = out / "figures.csv"
        self.rows = _rows(self.table, step)
        self.pending: list[dict[str, float]] = []
        self.bar = tqdm(total=config.steps, initial=step, desc="post-tuning", unit="step")
        self.board = _board(out / "tensorboard")

    def add(self, step: int, **figures: float) -> None:
        """Add the figures of a step. Every `log_every` steps, their mean is logged."""
        self.bar.update()
        self.pending.append(figures)
        if step % self.config.log_every and step != self.config.steps:
            return
        mean = {name: sum(row[name] for row in self.pending) / len(self.pending) for name in figures}
        self.pending.clear()
        self.bar.set_postfix(loss=f"{mean['loss']:.4g}")
        self.rows.append({"step": float(step), **mean})
        write_atomically(self.table, self._write_table)
        if self.board is not None:
            for name, value in mean.items():
                self.board.add_scalar(name, value, step)
        if step % self.config.save_every == 0 or step == self.config.steps:
            self._plot()

    def sample(self, step: int, svd: SVD, video: Video) -> None:
        """Generate a sample video from a training video's first frame with the current weights."""
        from ..diffusers.sampling import generate_video
        from ..method.noise_levels import SIGMA_MAX, SIGMA_MIN

        config = self.config
        distilled = config.objective == "distill"
        image = read_window(video.path, 0, 1, 1, config.width, config.height)
        bucket = config.motion_bucket_id if config.motion_bucket_id >= 0 else video.motion_bucket
        generated = generate_video(
            svd,
            image.float() / 255,
            frames=config.frames,
            fps=config.fps,
            motion_bucket_id=127 if bucket is None else bucket,
            noise_aug_strength=0.0,
            steps=config.distill_steps if distilled else config.sample_steps,
            sigmas=(config.distill_sigma_max, config.distill_sigma_min) if distilled else (SIGMA_MAX, SIGMA_MIN),
            seed=config.seed,
        )
        folder = self.out / "samples"
        folder.mkdir(exist_ok=True)
        write_video(folder / f"step-{step:08d}.mp4", generated, config.fps)

    def close(self) -> None:
        """Close the progress bar and the TensorBoard log."""
        self.bar.close()
        if self.board is not None:
            self.board.close()

    def _write_table(self, path: Path) -> None:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, _COLUMNS)
            writer.writeheader()
            writer.writerows(self.rows)

    def _plot(self) -> None:
        try:
            from matplotlib.figure import Figure
        except ImportError:
            return  # optional: the table has the same figures
        figure = Figure(figsize=(8, 4.5))
        axes = figure.subplots()
        steps = [row["step"] for row in self.rows]
        losses = [row["loss"] for row in self.rows]
        axes.plot(steps, losses, alpha=0.3, label="loss")
        axes.plot(steps, _smoothed(losses), label="smoothed")
        axes.set(xlabel="step", ylabel="loss", yscale="log" if min(losses) > 0 else "linear")
        axes.legend()
        write_atomically(self.out / "loss.png", lambda part: figure.savefig(part, format="png", dpi=120))


def _rows(table: Path, step: int) -> list[dict[str, float]]:
    if not table.exists():
        return []
    with table.open(newline="", encoding="utf-8") as file:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    return [row for row in rows if row["step"] <= step]


def _smoothed(values: list[float], window: int = 25) -> list[float]:
    """Moving average over the last `window` values, ignoring NaN and infinity."""
    smoothed = []
    for end in range(1, len(values) + 1):
        recent = [value for value in values[max(0, end - window) : end] if math.isfinite(value)]
        smoothed.append(sum(recent) / len(recent) if recent else math.nan)
    return smoothed


def _board(folder: Path):  # noqa: ANN202 - torch's SummaryWriter or None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        _log.info("TensorBoard is not installed. Run pip install tensorboard to get its log.")
        return None
    return SummaryWriter(str(folder))
