"""Extensions that were distilled for few steps: what their files say, and what is said about other settings."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import comfy.samplers
import pytest
import torch

from composition import sample
from exvideo_core.comfyui.apply.patch import apply_extension
from exvideo_core.comfyui.checkpoint.load import load_checkpoint
from exvideo_core.comfyui.sampling.windows import WindowSettings, with_windows
from exvideo_core.method.extension import Extension, FewSteps
from exvideo_core.post_tuning.distillation import phase_levels
from exvideo_core.video.charts import extension_chart

MADE_FOR = FewSteps(4)


@pytest.fixture(scope="module")
def base(small_models):
    return load_checkpoint(str(small_models[0]))[0]


@pytest.fixture(scope="module")
def extension(small_models) -> Extension:
    return replace(Extension.load(small_models[1]), few_steps=MADE_FOR)


@pytest.mark.parametrize("steps", [1, 4, 8])
def test_phases_begin_at_the_levels_of_the_hosts_schedule(base, steps: int) -> None:
    sampling = base.get_model_object("model_sampling")
    expected = comfy.samplers.calculate_sigmas(sampling, MADE_FOR.scheduler, steps)
    torch.testing.assert_close(phase_levels(steps), expected.float(), rtol=1e-3, atol=1e-6)


def test_a_file_keeps_what_it_was_made_for(extension, tmp_path: Path) -> None:
    extension.save(tmp_path / "few.safetensors")
    found = Extension.load(tmp_path / "few.safetensors")
    assert found.few_steps == MADE_FOR and str(found.few_steps) == "4 steps, CFG 1, euler, sgm_uniform"
    assert FewSteps.from_metadata({"exvideo.steps": "many"}) is None
    assert FewSteps.from_metadata({}) is None
    assert FewSteps.from_metadata({"exvideo.steps": "2", "exvideo.guidance": "1.5"}) == FewSteps(2, 1.5)


@pytest.mark.parametrize("windows", [False, True])
@pytest.mark.parametrize(("steps", "cfg", "said"), [(4, 1.0, False), (3, 1.0, True), (4, 2.0, True)])
def test_other_settings_are_said_once(
    base, extension, caplog, windows: bool, steps: int, cfg: float, said: bool
) -> None:
    model = apply_extension(base, extension)
    if windows:
        model = with_windows(model, WindowSettings(4, 1))
    with caplog.at_level(logging.WARNING):
        sample(model, steps=steps, cfg=cfg)
    lines = [record.getMessage() for record in caplog.records if "was distilled" in record.getMessage()]
    expected = f"was distilled for 4 steps, CFG 1, euler, sgm_uniform. This run has {steps} steps and CFG {cfg:g}."
    assert len(lines) == said and all(expected in line for line in lines)


def test_a_usual_extension_says_nothing(base, small_models, caplog) -> None:
    with caplog.at_level(logging.WARNING):
        sample(apply_extension(base, Extension.load(small_models[1])), steps=2, cfg=2.0)
    assert not [record for record in caplog.records if "was distilled" in record.getMessage()]


def test_the_plot_says_what_it_was_made_for(extension) -> None:
    import numpy as np

    usual = replace(extension, few_steps=None)
    images = [np.asarray(extension_chart(each, [], 0)) for each in (extension, usual)]
    assert images[0].shape == images[1].shape and (images[0] != images[1]).any()
