"""What a post-tuning run is told: a YAML file, each value of which the command line can replace."""

from __future__ import annotations

import argparse
import dataclasses
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal


class ConfigError(ValueError):
    """A setting is missing or wrong; the message says which and what to do."""


def _setting(default: Any, text: str) -> Any:  # noqa: ANN401 - the field's own type
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Config:
    """Settings of a run. The defaults are the published recipe (paper section 4.1 and the reference's script)."""

    base: str = _setting("", "SVD model: a single .safetensors file or a diffusers folder")
    data: str = _setting("", "folder of videos, with or without a metadata.json")
    out: str = _setting("", "folder for checkpoints, logs, sample clips and the finished extension")
    init: str = _setting("", "extension to start from (default: an untrained one)")

    frames: int = _setting(128, "frames of a training clip, and of the extension")
    width: int = _setting(512, "pixels, a multiple of 64")
    height: int = _setting(512, "pixels, a multiple of 64")
    interval: int = _setting(1, "take every n-th frame of a video")
    fps: int = _setting(30, "frames per second that the model is told")
    motion_bucket_id: int = _setting(-1, "motion bucket of every clip (-1: metadata.json's, or else measured)")
    cache: bool = _setting(True, "encode every video once, before training, and keep the latents")
    cache_folder: str = _setting("", "where they are kept; runs may share it (default: OUT/cache)")

    train_positions: bool = _setting(True, "train the position tables")
    train_convolution: bool = _setting(True, "train the 3-D convolutions")
    train_attention: bool = _setting(True, "train the rest of the temporal blocks")

    steps: int = _setting(20_000, "optimizer steps")
    accumulation: int = _setting(1, "clips per optimizer step and process")
    learning_rate: float = _setting(1e-5, "of AdamW")
    positions_rate: float = _setting(1.0, "learning rate of the position tables, as a multiple")
    warmup: int = _setting(0, "steps over which the learning rate rises from 0")
    schedule: Literal["constant", "cosine"] = _setting("constant", "learning rate after the warm-up")
    weight_decay: float = _setting(0.01, "of AdamW")
    adam_epsilon: float = _setting(1e-8, "of AdamW: gradients well below it move a weight in proportion")
    clip_gradients: float = _setting(0.0, "largest norm of the gradient (0: unlimited)")
    contrast: float = _setting(1.01, "target latents are multiplied by this")
    ema: float = _setting(0.9, "share that the moving average keeps at each update")
    ema_every: int = _setting(500, "steps between updates of the moving average")
    eight_bit_adam: bool = _setting(False, "optimizer states in 8 bits (needs bitsandbytes and an NVIDIA GPU)")
    gradient_checkpointing: bool = _setting(True, "recompute activations: far less memory, a third more time")
    mixed_precision: Literal["no", "fp16", "bf16"] = _setting("fp16", "precision of the UNet's computation")
    seed: int = _setting(0, "of clips, windows and noise")

    save_every: int = _setting(500, "steps between checkpoints")
    keep: int = _setting(2, "checkpoints that are kept")
    sample_every: int = _setting(0, "steps between sample clips (0: none)")
    sample_steps: int = _setting(25, "denoising steps of a sample clip")
    log_every: int = _setting(10, "steps between logged figures")

    def check(self) -> None:
        """Raise `ConfigError` for what cannot be meant."""
        for name in ("base", "data", "out"):
            if not getattr(self, name):
                raise ConfigError(f"{name} is not set. Set it in the config file or with --{name}.")
        if self.width % 64 or self.height % 64 or min(self.width, self.height) < 64:
            raise ConfigError(f"The size is {self.width}x{self.height}, but SVD needs multiples of 64.")
        for name in ("frames", "interval", "steps", "accumulation", "save_every", "ema_every", "log_every", "keep"):
            minimum = 2 if name == "frames" else 1
            if getattr(self, name) < minimum:
                raise ConfigError(f"{name} is {getattr(self, name)}, but has to be at least {minimum}.")
        if not (self.train_positions or self.train_convolution or self.train_attention):
            raise ConfigError(
                "There is nothing to train. Enable train_positions, train_convolution or train_attention."
            )
        if not 0 <= self.ema < 1:
            raise ConfigError(f"ema is {self.ema}, but has to be at least 0 (off) and below 1.")

    @property
    def cache_path(self) -> Path | None:
        """Folder of the encoded videos, or None where every clip is encoded as it is drawn."""
        if not self.cache:
            return None
        return Path(self.cache_folder) if self.cache_folder else Path(self.out) / "cache"

    @property
    def span(self) -> int:
        """Frames of a video that a clip reaches over."""
        return (self.frames - 1) * self.interval + 1


def load(path: Path) -> dict[str, Any]:
    """Settings of a YAML file.

    Raises:
        ConfigError: the file cannot be read or names what is no setting.
    """
    import yaml

    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path} does not contain settings. Write one 'name: value' per line.")
    unknown = sorted(set(found) - {f.name for f in dataclasses.fields(Config)})
    if unknown:
        raise ConfigError(f"{path} has unknown settings {', '.join(unknown)}. Run with --help to list all settings.")
    return found


def parse(arguments: list[str] | None = None) -> Config:
    """Settings of a command line: defaults, then the file given by --config, then the options."""
    parser = argparse.ArgumentParser(
        prog="python -m exvideo_core.post_tuning",
        description="Post-tune an ExVideo extension for a Stable Video Diffusion model.",
        epilog="On several GPUs: accelerate launch -m exvideo_core.post_tuning --config FILE",
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--config", type=Path, help="YAML file of the settings below")
    hints = typing.get_type_hints(Config)
    for f in dataclasses.fields(Config):
        kind: Any = hints[f.name]
        options: dict[str, Any] = {"help": f"{f.metadata['help']} (default: {f.default!r})"}
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(kind) is Literal:
            options["choices"] = typing.get_args(kind)
        else:
            options |= {"type": kind, "metavar": kind.__name__.upper()}
        parser.add_argument(f"--{f.name.replace('_', '-')}", **options)
    given = vars(parser.parse_args(arguments))
    settings = load(given.pop("config")) if "config" in given else {}
    settings |= given
    for name, value in settings.items():
        settings[name] = _as(hints[name], name, value)
    config = Config(**settings)
    config.check()
    return config


def _as(kind: Any, name: str, value: Any) -> Any:  # noqa: ANN401 - any setting
    """A value as its setting's type: YAML reads 1e-5 as text and 1 as a whole number."""
    if typing.get_origin(kind) is Literal:
        if value is False:
            value = "no"  # YAML's reading of a bare no
        if value not in typing.get_args(kind):
            raise ConfigError(f"{name} is {value!r}. Choose {' or '.join(typing.get_args(kind))}.")
        return value
    try:
        if kind is bool and not isinstance(value, bool):
            raise ValueError
        if kind is int and (isinstance(value, bool) or float(value) != int(value)):
            raise ValueError
        return kind(value)
    except (TypeError, ValueError):
        raise ConfigError(f"{name} is {value!r}, expected a value of type {kind.__name__}.") from None
