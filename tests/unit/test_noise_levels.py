"""How post-tuning draws noise levels: the published ramp, an interval, log-normal, and mixtures with the ramp."""

from __future__ import annotations

import math

import pytest
import torch

from exvideo_core.method.noise_levels import SIGMA_MAX, SIGMA_MIN
from exvideo_core.post_tuning.loss import sigma_ramp
from exvideo_core.post_tuning.noise import noise_levels


def test_the_default_is_the_published_ramp() -> None:
    assert noise_levels().equal(sigma_ramp())
    assert noise_levels("lognormal", share=0.0).equal(sigma_ramp())


def test_an_interval_is_even_by_the_logarithm() -> None:
    levels = noise_levels("interval", low=0.3, high=20.0)
    steps = levels.log().diff()
    assert 0.3 < levels[-1] < 0.302 and 19.8 < levels[0] < 20
    torch.testing.assert_close(steps, torch.full_like(steps, math.log(0.3 / 20) / 1000), rtol=0, atol=1e-5)


def test_lognormal_has_its_mean_and_deviation_within_the_samplers_ends() -> None:
    levels = noise_levels("lognormal", mean=1.0, deviation=1.6)
    assert levels.log().mean() == pytest.approx(1.0, abs=1e-3) and levels.log().std() == pytest.approx(1.6, abs=0.01)
    wide = noise_levels("lognormal", mean=1.0, deviation=9.0)
    assert wide.max() == pytest.approx(SIGMA_MAX) and wide.min() == pytest.approx(SIGMA_MIN)


def test_a_share_mixes_with_the_ramp() -> None:
    levels = noise_levels("interval", low=0.3, high=20.0, share=0.4)
    assert len(levels) == 1000 and levels.diff().max() <= 0
    ramp = sigma_ramp(600)
    inside = ((levels >= 0.3) & (levels <= 20)).sum() - ((ramp >= 0.3) & (ramp <= 20)).sum()
    assert inside == 400
    assert levels[0] == SIGMA_MAX
