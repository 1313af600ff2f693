"""Frame positions against the formulas of the reference, written out independently."""

from __future__ import annotations

import math

import pytest
import torch

from exvideo_core.method.positions import blended_table, ping_pong, sinusoidal, table_for


def test_sinusoidal_is_cosine_first() -> None:
    table = sinusoidal(torch.tensor([0, 3, 100]), 8)
    for row, position in zip(table, (0, 3, 100), strict=True):
        angles = [position * 10000 ** (-i / 4) for i in range(4)]
        expected = [math.cos(a) for a in angles] + [math.sin(a) for a in angles]
        torch.testing.assert_close(row, torch.tensor(expected), rtol=0, atol=1e-5)


def test_ping_pong_of_25_rows() -> None:
    def expected(frame: int) -> int:
        if frame < 25:
            return frame
        k = (frame - 25) % 40
        return 23 - k if k < 20 else k - 15

    assert ping_pong(200).tolist() == [expected(frame) for frame in range(200)]


@pytest.mark.parametrize("rows", [1, 2, 5, 6, 128])
def test_ping_pong_stays_in_the_table_and_moves_by_one(rows: int) -> None:
    walk = ping_pong(5 * rows + 3, rows)
    assert walk.min() >= 0 and walk.max() == rows - 1
    assert walk.diff().abs().max() <= 1


def test_trained_takes_the_first_rows_and_refuses_more() -> None:
    table = torch.randn(6, 4)
    assert table_for(table, 4, "trained").equal(table[:4])
    with pytest.raises(ValueError, match="7 frames.*trained for 6.*'stretch' or 'repeat'"):
        table_for(table, 7, "trained")


def test_stretch_is_linear_between_rows() -> None:
    table = torch.tensor([[0.0], [10.0], [40.0]])
    assert table_for(table, 5, "stretch").flatten().tolist() == [0, 5, 10, 25, 40]
    assert table_for(table, 3, "stretch").equal(table)


def test_stretch_of_half_precision_does_not_lose_rows() -> None:
    table = torch.arange(128, dtype=torch.float16)[:, None]
    assert table_for(table, 255, "stretch").flatten().tolist() == [i / 2 for i in range(255)]


def test_repeat_goes_on_past_the_end() -> None:
    table = torch.arange(25.0)[:, None]
    assert table_for(table, 28, "repeat").flatten().tolist() == [*range(25), 23, 22, 21]


def test_strength_moves_between_sinusoid_and_table() -> None:
    table = torch.randn(5, 8)
    expected = 0.25 * table + 0.75 * sinusoidal(torch.arange(5), 8)
    torch.testing.assert_close(blended_table(table, 5, "trained", 0.25), expected)
    assert blended_table(table, 5, "trained", 1.0).equal(table)
