"""The synthetic world, and that what measures clips of it sees what is wrong with them."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import method_measures as measures
from small_model import measure, world

FRAMES = 128


def bounced(clip: world.Clip, frames: int) -> np.ndarray:
    """The path walked frame by frame, mirrored at the walls."""
    x, speed = clip.x.copy(), np.where(clip.kind == 0, clip.speed, -clip.speed)
    path = []
    for _ in range(frames):
        path.append(x.copy())
        x = x + speed
        for wall, beyond in ((world.LEFT, x < world.LEFT), (world.RIGHT, x > world.RIGHT)):
            x = np.where(beyond, 2 * wall - x, x)
            speed = np.where(beyond, -speed, speed)
    return np.array(path)


@pytest.mark.parametrize("seed", range(6))
def test_shapes_run_and_turn_round(seed: int) -> None:
    clip = world.sample(seed)
    np.testing.assert_allclose(clip.path(FRAMES), bounced(clip, FRAMES), atol=1e-9)
    assert sorted(clip.colour) == [0, 1]


def test_a_seed_is_one_clip() -> None:
    assert all(np.array_equal(world.sample(5).x, world.sample(5).x) for _ in range(2))
    starts = {float(world.sample(seed).x[0]) for seed in (*range(50), *range(world.HELD_OUT, world.HELD_OUT + 50))}
    assert len(starts) == 100


def figures(clip: world.Clip, video: np.ndarray) -> dict[str, float]:
    return measures.of_clip(clip, video)[0]


def test_the_truth_measures_as_true() -> None:
    for seed in range(5):
        clip = world.sample(seed)
        found = figures(clip, world.render(clip, FRAMES))
        assert found["presence"] == 1 and found["path_error"] < 0.003 and found["jump"] < 0.3
        assert found["largest_step"] == pytest.approx(1, abs=0.4) and found["background_drift"] < 1e-3
        assert found["largest_stride"] == pytest.approx(1, abs=0.1)


def test_what_stands_still_or_runs_elsewhere_measures_as_wrong() -> None:
    clip = world.sample(3)
    truth = clip.path(FRAMES)
    still = figures(clip, world.draw(clip, np.repeat(truth[:1], FRAMES, 0)))
    assert still["path_error"] == pytest.approx(np.abs(truth - truth[0]).mean(), abs=0.003)
    assert still["jump"] == pytest.approx(1, abs=0.05) and still["largest_step"] < 0.01
    mirrored = figures(clip, world.draw(clip, world.LEFT + world.RIGHT - truth))
    assert mirrored["path_error"] == pytest.approx(np.abs(2 * truth - world.LEFT - world.RIGHT).mean(), abs=0.003)
    assert mirrored["jump"] == pytest.approx(2, abs=0.3)
    leap = truth.copy()
    leap[60:] = truth[60:][::-1]
    assert figures(clip, world.draw(clip, leap))["jump"] > 0.5


def test_wobble_is_in_steps_and_leaps_are_in_strides_too() -> None:
    clip = world.sample(3)
    truth = clip.path(FRAMES)
    wobble = truth + 1.5 * clip.speed * np.where(np.arange(FRAMES) % 2, 1, -1)[:, None]
    shaken = figures(clip, world.draw(clip, wobble))
    assert shaken["largest_step"] > 3 and shaken["largest_stride"] == pytest.approx(1, abs=0.2)
    leaps = truth + 12 * clip.speed * (np.arange(FRAMES) % 32 >= 16)[:, None]
    assert figures(clip, world.draw(clip, leaps))["largest_stride"] > 2


def test_lost_swapped_and_smeared_shapes_are_not_present() -> None:
    clip = world.sample(3)
    truth = world.render(clip, 16)
    empty = np.broadcast_to(world.background(), truth.shape)
    found = figures(clip, empty)
    assert found["presence"] == 0 and found["path_error"] == measure.ABSENT_ERROR and found["jump"] == 2
    assert not measure.sight(clip, truth[..., ::-1]).present.any()  # red and blue exchanged
    half = truth.copy()
    half[:, : world.SIZE // 2] = world.background()[: world.SIZE // 2]
    assert measure.sight(clip, half).present.mean(0).tolist() == [0, 1]
    moved = np.abs(clip.path(16) - (world.LEFT + world.RIGHT) / 2).max(1) > world.RADIUS
    ghost = 0.5 * truth + 0.5 * world.draw(clip, world.LEFT + world.RIGHT - clip.path(16))
    assert moved.any() and not measure.sight(clip, ghost).present[moved].all()


def test_a_background_that_changes_is_seen() -> None:
    clip = world.sample(3)
    video = world.render(clip, 20) + np.linspace(0, 0.2, 20)[:, None, None, None]
    assert figures(clip, video)["background_drift"] == pytest.approx(0.1, abs=0.02)


def test_frechet_is_the_closed_form_and_tells_worlds_apart() -> None:
    random = np.random.default_rng(0)
    a, b = random.normal(0, 1, (40_000, 3)), random.normal([1, 0, 0], [2, 1, 0.5], (40_000, 3))
    assert measures.frechet(a, b) == pytest.approx(1 + 1 + 0 + 0.25, abs=0.08)  # |m|^2 + sum (s - t)^2
    features = measures.Features(range(100))
    assert features.explained > 0.5
    clips = [world.sample(seed) for seed in range(1000, 1064)]
    true = np.stack([features(world.render(world.sample(seed), FRAMES)) for seed in range(2000, 2200)])
    right = np.stack([features(world.render(clip, FRAMES)) for clip in clips])
    still = np.stack([features(world.draw(clip, np.repeat(clip.path(1), FRAMES, 0))) for clip in clips])
    good, bad = measures.frechet_interval(right, true), measures.frechet_interval(still, true)
    assert good["high"] < bad["low"]


def test_intervals_cover_the_mean_as_often_as_they_say() -> None:
    random = np.random.default_rng(1)
    covered = 0
    for trial in range(200):
        found = measures.interval(random.normal(0, 1, 64), seed=trial, draws=400)
        covered += found["low"] <= 0 <= found["high"]
    assert 175 <= covered <= 199
