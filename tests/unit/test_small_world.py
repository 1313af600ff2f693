"""The synthetic world, and the measures of its videos."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks import method_measures as measures
from small_model import measure, world
from small_model.figures import of_clip
from small_model.scenes import Scenes

FRAMES = 128


def bounced(clip: world.Clip, frames: int) -> np.ndarray:
    """The path walked frame by frame, mirrored at the walls."""
    x, speed = clip.x.copy(), clip.heading * clip.speed
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
    assert sorted(clip.color) == [0, 1]


def test_a_first_frame_leaves_two_futures_a_lane_open() -> None:
    clip = world.sample(4)
    futures = clip.futures(FRAMES)
    assert np.array_equal(futures[0, 0], futures[1, 0]) and not np.allclose(futures[0], futures[1])
    for lane in range(world.LANES):
        chosen = world.HEADINGS.index(clip.heading[lane])
        np.testing.assert_array_equal(clip.path(FRAMES)[:, lane], futures[chosen, :, lane])


def test_headings_are_drawn_evenly_whatever_else_a_clip_shows() -> None:
    clips = [world.sample(seed) for seed in range(2000)]
    heading = np.array([clip.heading for clip in clips])
    for name in ("kind", "color"):
        for value in range(2):
            chosen = heading[np.array([getattr(clip, name) for clip in clips]) == value]
            low, high = measure.binomial_interval(int((chosen > 0).sum()), chosen.size)
            assert low < 0.5 < high
    low, high = measure.binomial_interval(int((heading[:, 0] == heading[:, 1]).sum()), len(clips))
    assert low < 0.5 < high  # the lanes know nothing of each other


def test_binomial_interval_is_wilsons() -> None:
    assert measure.binomial_interval(5, 10) == pytest.approx((0.2366, 0.7634), abs=2e-4)
    assert measure.binomial_interval(0, 10) == pytest.approx((0, 0.2775), abs=2e-4)


def test_a_seed_is_one_clip() -> None:
    assert all(np.array_equal(world.sample(5).x, world.sample(5).x) for _ in range(2))
    starts = {float(world.sample(seed).x[0]) for seed in (*range(50), *range(world.HELD_OUT, world.HELD_OUT + 50))}
    assert len(starts) == 100


def figures(clip: world.Clip, video: np.ndarray) -> dict[str, float]:
    return of_clip(clip, video).values


def test_the_truth_measures_as_true() -> None:
    for seed in range(5):
        clip = world.sample(seed)
        found = figures(clip, world.render(clip, FRAMES))
        assert found["presence"] == 1 and found["path_error"] < 0.003 and found["jump"] < 0.3
        assert found["largest_step"] == pytest.approx(1, abs=0.4) and found["background_drift"] < 1e-3
        assert found["largest_stride"] == pytest.approx(1, abs=0.1)


def nearest_error(clip: world.Clip, centers: np.ndarray) -> float:
    """Distance of centers from the nearest future of each lane, in picture widths."""
    return float(np.abs(centers[None] - clip.futures(len(centers))).mean(1).min(0).mean())


def test_what_stands_still_or_changes_its_mind_measures_as_wrong() -> None:
    clip = world.sample(3)
    truth = clip.path(FRAMES)
    stands = np.repeat(truth[:1], FRAMES, 0)
    still = figures(clip, world.draw(clip, stands))
    assert still["path_error"] == pytest.approx(nearest_error(clip, stands), abs=0.003) and still["path_error"] > 0.1
    assert still["jump"] == pytest.approx(1, abs=0.05) and still["largest_step"] < 0.01
    futures = clip.futures(FRAMES)
    changed = np.concatenate([futures[0, :60], futures[1, 60:]])
    doubtful = figures(clip, world.draw(clip, changed))
    assert doubtful["path_error"] == pytest.approx(nearest_error(clip, changed), abs=0.003)
    assert doubtful["path_error"] > 0.05
    leap = truth.copy()
    leap[60:] = truth[60:][::-1]
    assert figures(clip, world.draw(clip, leap))["jump"] > 0.5


def test_either_future_measures_as_true() -> None:
    clip = world.sample(3)
    for index, heading in enumerate(world.HEADINGS):
        video = world.draw(clip, clip.futures(FRAMES)[index])
        found = figures(clip, video)
        assert found["presence"] == 1 and found["path_error"] < 0.003 and found["jump"] < 0.3
        assert (measure.match(measure.sight(clip, video), clip).heading == heading).all()
        assert of_clip(clip, video).to_the_right == (world.LANES if heading > 0 else 0)


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


def test_a_ghost_is_not_present() -> None:
    """The mean of the futures, which a model shows that has not chosen: half of each shape in two places."""
    clip = world.sample(3)
    futures = clip.futures(FRAMES)
    ghost = (world.draw(clip, futures[0]) + world.draw(clip, futures[1])) / 2
    sighting = measure.sight(clip, ghost)
    apart = np.abs(futures[0] - futures[1]) > 2 * world.RADIUS
    together = np.abs(futures[0] - futures[1]) < 0.01
    assert apart.mean() > 0.2 and not sighting.present[apart].any()
    assert sighting.strength[apart].max() < 0.6
    assert together.any() and sighting.present[together].all()


def test_exchanged_colors_are_seen() -> None:
    clip = world.sample(3)
    video = world.render(clip, 16)
    assert not measure.sight(clip, video).exchanged.any()
    video[4:8] = video[4:8, ..., ::-1] * [1, 1, 1]
    assert measure.sight(clip, video).exchanged.all(1).tolist() == [4 <= frame < 8 for frame in range(16)]
    one = world.render(clip, 1)
    half = slice(0, world.SIZE // 2)
    one[:, half] = one[:, half, :, ::-1]
    assert measure.sight(clip, one).exchanged.tolist() == [[True, False]]


def test_spots_of_the_other_color_are_seen() -> None:
    clip = world.sample(3)
    video = world.render(clip, 16)
    assert not measure.sight(clip, video).mixed.any()
    size, centers = world.SIZE, clip.path(16)[:, 0]
    grid = (np.arange(size) + 0.5) / size
    spot = (np.abs(grid[None] - centers[:, None]) < 0.4 * world.RADIUS)[:, None, :]
    rows = (np.abs(grid - clip.y[0]) < 0.4 * world.RADIUS)[None, :, None]
    video = np.where((spot & rows)[..., None], video[..., ::-1], video)
    sighting = measure.sight(clip, video)
    assert sighting.mixed.tolist() == [[True, False]] * 16 and not sighting.exchanged.any()


@pytest.mark.parametrize("seed", range(4))
def test_kinds_are_told_by_their_templates(seed: int) -> None:
    clip = world.sample(seed)
    for kind in range(len(world.KINDS)):
        alike = replace(clip, kind=np.full(world.LANES, kind))
        noise = np.random.default_rng(seed).normal(0, 0.05, (24, world.SIZE, world.SIZE, 3))
        video = (world.render(alike, 24) + noise).clip(0, 1)
        assert (measure.kinds(clip, video, measure.sight(clip, video)) == kind).all()
    empty = np.broadcast_to(world.background(), (2, world.SIZE, world.SIZE, 3))
    assert (measure.kinds(clip, empty, measure.sight(clip, empty)) == -1).all()


def test_scenes_draw_what_the_world_draws() -> None:
    clips = [world.sample(seed) for seed in range(8)]
    scenes = Scenes.of(clips)
    video = scenes.draw(scenes.centers(torch.arange(40))).movedim(2, -1).numpy()
    for drawn, clip in zip(video, clips, strict=True):
        np.testing.assert_allclose(drawn, world.render(clip, 40), atol=1e-5)
    part = scenes[torch.tensor([3, 5])]
    np.testing.assert_allclose(part.centers(torch.arange(9))[1].numpy(), clips[5].path(9), atol=1e-6)


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
    apart = measures.frechet_difference(right, still, true)
    assert apart["mean"] == pytest.approx(good["mean"] - bad["mean"]) and apart["high"] < 0
    # What both share does not widen the interval of their difference.
    assert apart["high"] - apart["low"] < good["high"] - good["low"] + bad["high"] - bad["low"]
    none = measures.frechet_difference(right, right, true)
    assert none == {"mean": 0, "low": 0, "high": 0}


def test_intervals_cover_the_mean_as_often_as_they_say() -> None:
    random = np.random.default_rng(1)
    covered = 0
    for trial in range(200):
        found = measures.interval(random.normal(0, 1, 64), seed=trial, draws=400)
        covered += found["low"] <= 0 <= found["high"]
    assert 175 <= covered <= 199
