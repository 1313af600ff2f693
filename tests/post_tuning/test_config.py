"""Settings: a file, the command line over it, and clear errors."""

from __future__ import annotations

from pathlib import Path

import pytest

from exvideo_core.post_tuning.config import ConfigError, parse


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text("base: a\ndata: b\nout: c\nlearning_rate: 2e-5\nmixed_precision: no\nsteps: 10\ncache: false\n")
    return path


def test_the_command_line_goes_over_the_file(file: Path) -> None:
    config = parse(["--config", str(file), "--steps", "20", "--no-train-positions"])
    assert (config.learning_rate, config.mixed_precision, config.steps) == (2e-5, "no", 20)
    assert not config.cache and not config.train_positions and config.train_convolution
    assert config.frames == 128 and config.contrast == 1.01 and config.ema == 0.9  # the published recipe


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("learning_rat: 1", "unknown settings learning_rat"),
        ("steps: many", "steps is 'many'"),
        ("steps: 1.5", "steps is 1.5"),
        ("cache: 3", "cache is 3"),
        ("mixed_precision: fp8", "no or fp16 or bf16"),
        ("width: 100", "multiples of 64"),
        ("frames: 1", "frames is 1"),
        ("ema: 1.0", "ema is 1.0"),
        ("batch: 0", "batch is 0"),
        ("noise: pink", "ramp or interval or lognormal"),
        ("noise_low: 30", "noise_low"),
        ("noise_share: 1.5", "noise_share"),
        ("noise_deviation: 0", "noise_deviation"),
        ("{", "cannot be read"),
        ("train_positions: false\ntrain_convolution: false\ntrain_attention: false", "nothing to train"),
        ("base: ''", "base is not set"),
    ],
)
def test_what_cannot_be_meant_is_said(file: Path, line: str, message: str) -> None:
    name = line.split(":")[0]
    kept = [old for old in file.read_text().splitlines() if old.split(":")[0] != name]
    file.write_text("\n".join([*kept, line]) + "\n")
    with pytest.raises(ConfigError, match=message):
        parse(["--config", str(file)])
