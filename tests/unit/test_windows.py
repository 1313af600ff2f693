"""Windows, their weights, recurring noise, and the frames that a text names."""

from __future__ import annotations

import pytest
import torch

from exvideo_core.choices import FUSES
from exvideo_core.video.frame_indices import frame_indices, noise_mask_values
from exvideo_core.video.windows import continuation_mask, freenoise, fuse_weights, split_windows


@pytest.mark.parametrize("length", [129, 160, 200, 224, 225, 256, 1800])
@pytest.mark.parametrize(("window", "overlap"), [(128, 32), (128, 1), (25, 24), (2, 1)])
def test_windows_cover_the_clip_and_share_enough(length: int, window: int, overlap: int) -> None:
    windows = split_windows(length, window, overlap)
    assert all(found == list(range(found[0], found[0] + window)) for found in windows)
    assert windows[0][0] == 0 and windows[-1][-1] == length - 1
    shared = [before[-1] - after[0] + 1 for before, after in zip(windows, windows[1:], strict=False)]
    assert min(shared) >= overlap
    # No fewer would do: what n windows reach with the overlap that was asked.
    fewer = len(windows) - 1
    assert fewer * window - (fewer - 1) * overlap < length


@pytest.mark.parametrize("length", [1, 2, 127, 128])
def test_a_clip_that_fits_is_one_window(length: int) -> None:
    assert split_windows(length, 128, 32) == [list(range(length))]


@pytest.mark.parametrize(("length", "window", "overlap"), [(128, 128, 32), (200, 128, 32), (40, 25, 4), (64, 128, 32)])
def test_a_closed_loop_runs_on_at_the_beginning(length: int, window: int, overlap: int) -> None:
    windows = split_windows(length, window, overlap, closed_loop=True)
    assert len(windows) > 1 and {frame for found in windows for frame in found} == set(range(length))
    for number, found in enumerate(windows):
        following = windows[(number + 1) % len(windows)]
        assert len(found) <= window
        assert len(set(found) & set(following)) >= overlap
        assert all((a + 1) % length == b for a, b in zip(found, found[1:], strict=False))


@pytest.mark.parametrize(("arguments", "message"), [((100, 8, 8), "smaller"), ((50, 128, 32, True), "25 or less")])
def test_impossible_windows_are_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        split_windows(*arguments)


def test_weights_of_a_linear_fade_sum_to_one() -> None:
    for loop in (False, True):
        windows = split_windows(200, 64, 16, loop)
        total = torch.zeros(200)
        for number, frames in enumerate(windows):
            total[frames] += fuse_weights(windows, number, "overlap-linear")
        torch.testing.assert_close(total, torch.ones(200), rtol=0, atol=1e-6)


@pytest.mark.parametrize("fuse", [fuse for fuse in FUSES if fuse != "sequential"])
def test_weights_are_positive_and_alike_from_both_sides(fuse: str) -> None:
    windows = split_windows(352, 128, 16)
    middle = fuse_weights(windows, 1, fuse)
    assert middle.shape == (128,) and (middle > 0).all()
    torch.testing.assert_close(middle, middle.flip(0))
    first, last = fuse_weights(windows, 0, fuse), fuse_weights(windows, len(windows) - 1, fuse)
    torch.testing.assert_close(first, last.flip(0))
    assert (first[:64] >= middle[:64]).all()  # the clip's own end is nothing to fade from


def test_finished_frames_are_held_and_fade_towards_a_windows_own() -> None:
    windows = split_windows(16, 10, 4)  # 0-9, 6-15
    assert continuation_mask(windows, 0).tolist() == [1] * 10
    torch.testing.assert_close(continuation_mask(windows, 1), torch.tensor([0, 1 / 4, 2 / 4, 3 / 4, 1, 1, 1, 1, 1, 1]))
    loop = split_windows(24, 16, 4, closed_loop=True)  # 0-15, 12-23 and 0-3
    assert loop == [[*range(16)], [*range(12, 24), *range(4)]]
    fade = [0, 1 / 4, 2 / 4, 3 / 4]
    torch.testing.assert_close(continuation_mask(loop, 1), torch.tensor([*fade, *[1] * 8, *fade[::-1]]))
    many = split_windows(30, 20, 14, closed_loop=True)  # a window that has nothing left to make
    assert not continuation_mask(many, len(many) - 1).any()


def test_recurring_noise_repeats_groups_in_another_order() -> None:
    noise = torch.randn(30, 4, 2, 2)
    made = freenoise(noise, window=10, overlap=4, seed=3)
    assert torch.equal(made[:10], noise[:10])
    rows = {tuple(frame.flatten().tolist()): index for index, frame in enumerate(noise[:10])}
    order = [rows[tuple(frame.flatten().tolist())] for frame in made]
    # Groups of six, each that of a window before, shuffled.
    for start in (10, 16, 22):
        assert sorted(order[start : start + 6]) == sorted(order[start - 10 : start - 4])
    assert order[10:16] != order[:6]
    assert torch.equal(made, freenoise(noise, 10, 4, seed=3))
    assert not torch.equal(made, freenoise(noise, 10, 4, seed=4))


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0", [0]), ("0, 64,-1", [0, 64, 127]), (" 0-3 , 7", [0, 1, 2, 3, 7]), ("-3--1", [125, 126, 127]), ("5-5", [5])],
)
def test_frames_are_named_by_numbers_and_ranges(text: str, expected: list[int]) -> None:
    assert frame_indices(text, 128) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "neither a frame"), ("1,", "neither a frame"), ("a", "'a'"), ("1.5", "neither"), ("128", "0 to 127"),
     ("-129", "0 to 127"), ("5-3", "backwards"), ("0,1,-128", "frame 0 more than once")],
)  # fmt: skip
def test_other_texts_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        frame_indices(text, 128)


def test_given_frames_are_held_and_a_run_fades_into_free_ones() -> None:
    assert noise_mask_values([0, 1, 2, 3, 7], 8, 0) == [0, 0, 0, 0, 1, 1, 1, 0]
    assert noise_mask_values([0, 1, 2, 3, 7], 8, 3) == [0, 1 / 4, 2 / 4, 3 / 4, 1, 1, 1, 0]
    # Never the first of a run, and not where the clip ends behind it.
    assert noise_mask_values([0, 1, 5, 6, 7], 8, 9) == [0, 1 / 2, 1, 1, 1, 0, 0, 0]
