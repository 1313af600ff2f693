"""Extensions that were distilled for few steps: what their files say, and what is said about other settings."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from comfy.k_diffusion.sampling import get_sigmas_karras

from composition import sample
from exvideo_core.comfyui.apply.patch import apply_extension
from exvideo_core.comfyui.checkpoint.load import load_checkpoint
from exvideo_core.comfyui.sampling.windows import WindowSettings, with_windows
from exvideo_core.method.extension import Extension, FewSteps
from exvideo_core.post_tuning.distillation import phase_levels
from exvideo_core.video.charts import extension_chart

MADE_FOR = FewSteps(4, sigma_max=45.0, sigma_min=2.5)
SETTINGS = "4 steps, CFG 1, euler, karras, sigma 45 to 2.5"


@pytest.fixture(scope="module")
def base(small_models):
    return load_checkpoint(str(small_models[0]))[0]


@pytest.fixture(scope="module")
def extension(small_models) -> Extension:
    return replace(Extension.load(small_models[1]), few_steps=MADE_FOR)


@pytest.mark.parametrize(("steps", "highest", "lowest"), [(1, 700.0, 1.0), (4, 70.0, 3.0), (8, 700.0, 0.002)])
def test_phases_begin_at_the_levels_of_the_hosts_schedule(steps: int, highest: float, lowest: float) -> None:
    expected = get_sigmas_karras(steps, lowest, highest, rho=7.0)
    torch.testing.assert_close(phase_levels(steps, highest, lowest), expected, rtol=1e-4, atol=1e-6)


def test_a_file_keeps_what_it_was_made_for(extension, tmp_path: Path) -> None:
    extension.save(tmp_path / "few.safetensors")
    found = Extension.load(tmp_path / "few.safetensors")
    assert found.few_steps == MADE_FOR and str(found.few_steps) == SETTINGS
    assert FewSteps.from_metadata({"exvideo.steps": "many"}) is None
    assert FewSteps.from_metadata({}) is None
    for name, value in (
        ("sigma_min", "0"),
        ("sigma_min", "50"),
        ("sigma_max", "inf"),
        ("guidance", "nan"),
        ("steps", "0"),
    ):
        assert FewSteps.from_metadata({**MADE_FOR.metadata(), f"exvideo.{name}": value}) is None, (name, value)
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
    expected = f"was distilled for {SETTINGS}. This run has {steps} steps, CFG {cfg:g}, sigma 45 to 2.5."
    assert len(lines) == said and all(expected in line for line in lines)


def _with_range(model, sigma_max: float, sigma_min: float):
    """The host's node."""
    from comfy_extras.nodes_model_advanced import ModelSamplingContinuousEDM

    return ModelSamplingContinuousEDM().patch(model, "v_prediction", sigma_max, sigma_min)[0]


def test_sampling_begins_and_ends_where_the_file_says(base, extension) -> None:
    usual = replace(extension, few_steps=None)
    expected = sample(_with_range(apply_extension(base, usual), 45.0, 2.5), steps=4, cfg=1.0)
    assert sample(apply_extension(base, extension), steps=4, cfg=1.0).equal(expected)
    assert not sample(apply_extension(base, usual), steps=4, cfg=1.0).equal(expected)
    assert float(base.get_model_object("model_sampling").sigma_max) == pytest.approx(700)
    assert sample(apply_extension(base, extension, 0.0), steps=4, cfg=1.0).equal(
        sample(apply_extension(base, usual, 0.0), steps=4, cfg=1.0)
    )


def test_what_the_host_saved_of_other_noise_levels_is_not_written_to_these(base, extension) -> None:
    sampling = apply_extension(base, extension).object_patches["model_sampling"]
    assert not dict(sampling.named_buffers())  # or the host would write them to the base's
    for name, value in base.get_model_object("model_sampling").named_buffers():
        sampling.register_buffer(name, value)
    assert float(sampling.sigma_max) == pytest.approx(45) and float(sampling.sigma_min) == pytest.approx(2.5)
    assert sampling.timestep(torch.tensor(45.0)) == base.get_model_object("model_sampling").timestep(torch.tensor(45.0))


def test_a_single_step_says_nothing(base, extension, caplog) -> None:
    one = replace(extension, few_steps=replace(MADE_FOR, steps=1))
    with caplog.at_level(logging.WARNING):
        sample(apply_extension(base, one), steps=1, cfg=1.0)
    assert not [record for record in caplog.records if "was distilled" in record.getMessage()]


def test_other_noise_levels_are_said(base, extension, caplog) -> None:
    model = apply_extension(base, extension)
    with caplog.at_level(logging.WARNING):
        sample(_with_range(model, 700.0, 2.5), steps=4, cfg=1.0)
    assert any("This run has 4 steps, CFG 1, sigma 700 to 2.5." in record.getMessage() for record in caplog.records)


def test_a_usual_extension_says_nothing(base, small_models, caplog) -> None:
    with caplog.at_level(logging.WARNING):
        sample(apply_extension(base, Extension.load(small_models[1])), steps=2, cfg=2.0)
    assert not [record for record in caplog.records if "was distilled" in record.getMessage()]


def test_the_plot_says_what_it_was_made_for(extension) -> None:
    import numpy as np

    usual = replace(extension, few_steps=None)
    images = [np.asarray(extension_chart(each, [], 0)) for each in (extension, usual)]
    assert images[0].shape == images[1].shape and (images[0] != images[1]).any()
