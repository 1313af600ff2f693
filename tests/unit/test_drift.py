"""The measures of `bench drift`, on true and on spoiled videos."""

from __future__ import annotations

import numpy as np

from benchmarks import drift
from benchmarks.length import border_step
from small_model import world

FRAMES = 256  # three windows of 128 frames, of which neighbors share 64


def clip() -> world.Clip:
    return world.sample(world.HELD_OUT)


def test_a_true_video_does_not_drift() -> None:
    found = drift.by_window(clip(), world.render(clip(), FRAMES))
    assert found["presence"].tolist() == [1, 1, 1] and found["exchanged"].tolist() == [0, 0, 0]
    assert found["path_error"].max() < 0.003 and found["background"].max() < 1e-6
    assert all(abs(drift.slope(values)) < 1e-3 for values in found.values())


def test_a_video_that_gets_brighter_drifts_by_as_much() -> None:
    video = world.render(clip(), FRAMES)
    video[128:192] += 0.01
    video[192:] += 0.02
    found = drift.by_window(clip(), video)
    rows = (world.render(clip(), FRAMES).max(-1) - world.render(clip(), FRAMES).min(-1) < 0.1).all(-1).mean()
    np.testing.assert_allclose(found["background"], [0, 0.01 * rows, 0.02 * rows], rtol=0.1)
    np.testing.assert_allclose(drift.slope(found["background"]), 0.01 * rows, rtol=0.1)


def test_shapes_that_are_lost_count_in_their_window() -> None:
    video = world.render(clip(), FRAMES)
    video[192:] = world.background()
    found = drift.by_window(clip(), video)
    assert found["presence"].tolist() == [1, 1, 0]
    rows = [{"presence": np.array([1.0, 0.5, 0.0])}, {"presence": np.array([1.0, 1.0, 1.0])}]
    metric = drift.metric(rows)
    assert metric["presence"]["mean"] == 0.75
    slopes = [metric["presence_slope"][name] for name in ("low", "mean", "high")]
    np.testing.assert_allclose(slopes, [-0.5, -0.25, 0], atol=1e-9)


def test_a_jump_counts_where_windows_meet() -> None:
    video = np.zeros((64, 2, 2, 3)) + (np.arange(64) * 0.001)[:, None, None, None]
    assert np.isclose(border_step(video, [32]), 1)
    assert np.isnan(border_step(video, []))
    video[32:] += 0.01
    assert np.isclose(border_step(video, [32]), (0.011 + 3 * 0.001) / 4 / 0.001)
    assert border_step(video, [20]) < 1
