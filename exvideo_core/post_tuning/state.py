"""Checkpoints of a run, written atomically and resumed bit-exactly."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from .config import Config, ConfigError

_NAME = re.compile(r"step-(\d+)")
#: Settings that may change when a run is resumed.
_CHANGEABLE = {
    "out",
    "steps",
    "save_every",
    "keep",
    "sample_every",
    "sample_steps",
    "log_every",
    "cache",
    "cache_folder",
}
_log = logging.getLogger(__name__)


class MovingAverage:
    """Exponential moving average (EMA) of weights, in float32 on the CPU.

    The first update copies the weights. The reference averages over epochs, with gamma 0.9.

    Args:
        gamma: decay per update.
    """

    def __init__(self, gamma: float) -> None:
        self.gamma = gamma
        self.values: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def update(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Update the average: gamma x average + (1 - gamma) x weights."""
        for name, weight in weights.items():
            current = weight.detach().to("cpu", torch.float32, copy=True)
            if name in self.values:
                self.values[name].mul_(self.gamma).add_(current, alpha=1 - self.gamma)
            else:
                self.values[name] = current


@dataclass
class Progress:
    """Progress of a run.

    Attributes:
        ema: the moving average, empty before its first update.
        step: number of finished optimizer steps.
    """

    ema: MovingAverage
    step: int = 0


def keep_trained_only(accelerator: Accelerator) -> None:
    """Save only the trained weights in checkpoints, without the gigabytes of the frozen base.

    Sharded training (FSDP, DeepSpeed) uses accelerate's own format instead.
    """
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        return

    def save(models: list[torch.nn.Module], weights: list[dict[str, torch.Tensor]], folder: str) -> None:
        from safetensors.torch import save_file

        if accelerator.is_main_process:
            trained = trained_weights(accelerator.unwrap_model(models[0]))
            save_file(trained, Path(folder) / "trained.safetensors")
        weights.clear()

    def load(models: list[torch.nn.Module], folder: str) -> None:
        from safetensors.torch import load_file

        model = accelerator.unwrap_model(models.pop())
        with torch.no_grad():
            for name, value in load_file(Path(folder) / "trained.safetensors").items():
                model.get_parameter(name).copy_(value)

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def trained_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The weights that are trained, by name."""
    return {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}


def save(accelerator: Accelerator, folder: Path, progress: Progress, config: Config) -> Path:
    """Save a checkpoint of the current step atomically, and delete old ones.

    Args:
        accelerator: the accelerator that has prepared model and optimizer.
        folder: folder of all checkpoints.
        progress: progress of the run.
        config: settings of the run.

    Returns:
        Folder of the checkpoint.
    """
    from safetensors.torch import save_file

    target = folder / f"step-{progress.step:08d}"
    part = folder / f"{target.name}.part"
    if accelerator.is_main_process:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(part))
    if accelerator.is_main_process:
        if progress.ema.values:
            save_file(progress.ema.values, part / "ema.safetensors")
        settings = {name: value for name, value in asdict(config).items() if name not in _CHANGEABLE}
        (part / "progress.json").write_text(json.dumps({"step": progress.step, "settings": settings}, indent=1))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        for path in (*part.rglob("*"), part):
            _sync(path)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(part, target)
        _sync(folder)
        for old in _checkpoints(folder)[: -config.keep]:
            shutil.rmtree(old, ignore_errors=True)
    accelerator.wait_for_everyone()
    return target


def resume(accelerator: Accelerator, folder: Path, progress: Progress, config: Config) -> bool:
    """Load the newest checkpoint, if there is one, and update `progress`.

    Returns:
        Whether there is a checkpoint.

    Raises:
        ConfigError: the checkpoint was saved with different settings.
    """
    from safetensors.torch import load_file

    found = _checkpoints(folder)
    if not found:
        return False
    newest = found[-1]
    stored = json.loads((newest / "progress.json").read_text())
    then = asdict(Config()) | stored["settings"]  # settings that did not exist then had their defaults' effect
    now = {name: value for name, value in asdict(config).items() if name not in _CHANGEABLE}
    changed = [f"{name} {then[name]!r} -> {now[name]!r}" for name in now if then[name] != now[name]]
    if changed:
        raise ConfigError(
            f"{newest} was saved with different settings ({', '.join(changed)}). Restore them or choose another out."
        )
    accelerator.load_state(str(newest))
    progress.step = int(stored["step"])
    if (newest / "ema.safetensors").exists():
        progress.ema.values = load_file(newest / "ema.safetensors")
    _log.info("Resumed at step %d.", progress.step)
    return True


def _checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.is_dir() and _NAME.fullmatch(path.name))


def _sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot open folders
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def clean(folder: Path) -> None:
    """Delete the temporary files of interrupted saves."""
    for part in folder.glob("*.part"):
        shutil.rmtree(part, ignore_errors=True)
