"""Settings of a post-tuning run, from a YAML file and the command line."""

from __future__ import annotations

import argparse
import dataclasses
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..choices import DistillTarget, NoiseKind, Objective


class ConfigError(ValueError):
    """A setting is missing or invalid. The message names the setting and the remedy."""


def _setting(default: Any, text: str) -> Any:  # noqa: ANN401 - any setting's type
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Config:
    """Settings of a run. The defaults follow the published recipe (paper section 4.1 and the reference's script)."""

    base: str = _setting("", "SVD model, as a .safetensors file or a diffusers folder")
    data: str = _setting("", "folder of training videos, optionally with a metadata.json")
    out: str = _setting("", "output folder for checkpoints, logs, sample videos and the extension")
    init: str = _setting("", "extension to start from (default: untrained)")

    frames: int = _setting(128, "frames per training clip, and frames of the extension")
    width: int = _setting(512, "width in pixels, a multiple of 64")
    height: int = _setting(512, "height in pixels, a multiple of 64")
    interval: int = _setting(1, "use every n-th frame of a video")
    fps: int = _setting(30, "frame rate that the model is conditioned on")
    motion_bucket_id: int = _setting(-1, "motion bucket of all clips (-1: from metadata.json, or else measured)")
    cache: bool = _setting(True, "encode all videos before training and cache their latents")
    cache_folder: str = _setting("", "folder of the cache, which several runs can share (default: OUT/cache)")

    train_positions: bool = _setting(True, "train the position tables")
    train_convolution: bool = _setting(True, "train the 3-D convolutions")
    train_attention: bool = _setting(True, "train all other weights of the temporal blocks")

    objective: Objective = _setting("denoise", "the published loss, or step distillation of the extension in init")
    distill_steps: int = _setting(4, "denoising steps that the distilled extension needs")
    distill_sigma_max: float = _setting(700.0, "noise level at which sampling starts")
    distill_sigma_min: float = _setting(1.0, "noise level of the last denoising step")
    distill_target: DistillTarget = _setting(
        "consistency", "what the teacher predicts: one of its steps, or whole phases"
    )
    distill_teacher_steps: int = _setting(50, "noise levels between which the teacher steps")
    distill_guidance: float = _setting(1.0, "classifier-free guidance of the teacher (1: none; the reference's is 2)")
    distill_decay: float = _setting(0.95, "decay of the target network per step")
    steps: int = _setting(20_000, "optimizer steps")
    batch: int = _setting(1, "clips per forward pass")
    accumulation: int = _setting(1, "gradient accumulation: batches per optimizer step and process")
    learning_rate: float = _setting(1e-5, "learning rate of AdamW")
    positions_rate: float = _setting(1.0, "factor on the learning rate for the position tables")
    warmup: int = _setting(0, "warm-up steps, in which the learning rate rises from 0")
    schedule: Literal["constant", "cosine"] = _setting("constant", "learning rate schedule after warm-up")
    weight_decay: float = _setting(0.01, "weight decay of AdamW")
    adam_epsilon: float = _setting(1e-8, "epsilon of AdamW")
    clip_gradients: float = _setting(0.0, "maximum gradient norm (0: unlimited)")
    noise: NoiseKind = _setting("ramp", "distribution of noise levels: the published ramp, an interval, or log-normal")
    noise_low: float = _setting(0.3, "lowest noise level of the interval")
    noise_high: float = _setting(20.0, "highest noise level of the interval")
    noise_mean: float = _setting(1.0, "mean of the logarithm of log-normal noise levels")
    noise_deviation: float = _setting(1.6, "standard deviation of the logarithm of log-normal noise levels")
    noise_share: float = _setting(1.0, "share of noise levels not drawn from the ramp")
    recycle: float = _setting(0.0, "share of clips whose first frame carries one of the model's own errors")
    recycle_bank: int = _setting(256, "number of errors to keep")
    recycle_highest: float = _setting(10.0, "highest noise level whose errors are kept")
    contrast: float = _setting(1.01, "factor on the target latents")
    ema: float = _setting(0.9, "decay of the moving average (EMA) per update")
    ema_every: int = _setting(500, "steps between updates of the moving average")
    eight_bit_adam: bool = _setting(False, "use 8-bit AdamW (requires bitsandbytes and an NVIDIA GPU)")
    gradient_checkpointing: bool = _setting(True, "recompute activations: much less memory, a third more time")
    mixed_precision: Literal["no", "fp16", "bf16"] = _setting("fp16", "precision of the UNet's computation")
    seed: int = _setting(0, "seed of clips and noise")

    save_every: int = _setting(500, "steps between checkpoints")
    keep: int = _setting(2, "number of checkpoints to keep")
    sample_every: int = _setting(0, "steps between sample videos (0: none)")
    sample_steps: int = _setting(25, "denoising steps of sample videos (distillation: distill_steps)")
    log_every: int = _setting(10, "steps between log entries")

    def check(self) -> None:
        """Check all settings.

        Raises:
            ConfigError: a setting is missing or invalid.
        """
        for name in ("base", "data", "out"):
            if not getattr(self, name):
                raise ConfigError(f"{name} is not set. Set it in the config file or with --{name}.")
        if self.width % 64 or self.height % 64 or min(self.width, self.height) < 64:
            raise ConfigError(f"The size is {self.width}x{self.height}, but SVD needs multiples of 64.")
        for name in ("frames", "interval", "steps", "batch", "accumulation", "save_every", "ema_every", "log_every",
                     "keep", "recycle_bank", "distill_steps", "distill_teacher_steps"):  # fmt: skip
            minimum = 2 if name == "frames" else 1
            if getattr(self, name) < minimum:
                raise ConfigError(f"{name} is {getattr(self, name)}, but has to be at least {minimum}.")
        if not (self.train_positions or self.train_convolution or self.train_attention):
            raise ConfigError(
                "There is nothing to train. Enable train_positions, train_convolution or train_attention."
            )
        for name in ("ema", "distill_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, but has to be at least 0 (off) and below 1.")
        if self.objective == "distill" and not self.init:
            raise ConfigError("init is not set. Distillation starts from a finished extension: set init to its file.")
        if not 0 < self.distill_sigma_min < self.distill_sigma_max:
            raise ConfigError(
                f"distill_sigma_min is {self.distill_sigma_min}, but has to be above 0 and below distill_sigma_max "
                f"({self.distill_sigma_max})."
            )
        if self.objective == "distill" and self.recycle:
            raise ConfigError("recycle is for objective denoise. Set it to 0.")
        for name in ("noise_share", "recycle"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, but has to be between 0 and 1.")
        if not 0 < self.noise_low < self.noise_high:
            raise ConfigError(
                f"noise_low is {self.noise_low}, but has to be above 0 and below noise_high ({self.noise_high})."
            )
        if self.noise_deviation <= 0:
            raise ConfigError(f"noise_deviation is {self.noise_deviation}, but has to be above 0.")

    @property
    def cache_path(self) -> Path | None:
        """Folder of the encoded videos, or None without a cache."""
        if not self.cache:
            return None
        return Path(self.cache_folder) if self.cache_folder else Path(self.out) / "cache"

    @property
    def span(self) -> int:
        """Number of source frames that a training clip spans."""
        return (self.frames - 1) * self.interval + 1


def load(path: Path) -> dict[str, Any]:
    """Load settings from a YAML file.

    Raises:
        ConfigError: the file cannot be read or contains unknown settings.
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
    """Parse the command line. Options override the file given with --config, which overrides the defaults.

    Raises:
        ConfigError: the file or a setting is invalid.
    """
    parser = argparse.ArgumentParser(
        prog="python -m exvideo_core.post_tuning",
        description="Post-tune an ExVideo extension for a Stable Video Diffusion model.",
        epilog="On several GPUs: accelerate launch -m exvideo_core.post_tuning --config FILE",
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--config", type=Path, help="YAML file with any of the settings below")
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
    options = vars(parser.parse_args(arguments))
    settings = load(options.pop("config")) if "config" in options else {}
    settings |= options
    for name, value in settings.items():
        settings[name] = _convert(hints[name], name, value)
    config = Config(**settings)
    config.check()
    return config


def _convert(kind: Any, name: str, value: Any) -> Any:  # noqa: ANN401 - any setting
    """Convert a value to its setting's type: YAML parses 1e-5 as a string and 1 as an integer."""
    if typing.get_origin(kind) is Literal:
        if value is False:
            value = "no"  # YAML parses an unquoted no as False
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
