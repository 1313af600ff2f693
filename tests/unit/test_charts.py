"""Pictures of extensions and clips: the numbers behind them, and where what is drawn."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from exvideo_core.method import tensor_names
from exvideo_core.method.distances import distances
from exvideo_core.method.extension import Extension
from exvideo_core.video.charts import contact_sheet, extension_chart, stack_clips

WIDTH, FRAMES = 8, 30


@pytest.fixture(scope="module")
def base() -> list[dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    shapes = tensor_names.extension_shapes([WIDTH] * 16, 6, FRAMES)
    return [
        {svd: torch.randn(shapes[f"blocks.{block}.{ours}"]) for ours, svd in tensor_names.SHARED_TENSORS.items()}
        for block in tensor_names.BLOCK_IDS
    ]


def test_untrained_is_at_no_distance(base) -> None:
    extension = Extension.untrained(base, [WIDTH] * 16, FRAMES)
    for distance in distances(extension, base):
        assert (distance.positions, distance.convolution, distance.weights) == (0, 0, 0)


def test_distances_are_relative_to_the_start(base) -> None:
    tensors = {
        name: tensor.clone() for name, tensor in Extension.untrained(base, [WIDTH] * 16, FRAMES).tensors().items()
    }
    block = tensor_names.BLOCK_IDS[3]
    for ours in tensor_names.SHARED_TENSORS:
        tensors[f"blocks.{block}.{ours}"] *= 1.25
    tensors[f"blocks.{block}.{tensor_names.CONV_WEIGHT}"][0, 1, 2, 0, 0] = 3.0
    tensors[f"blocks.{block}.{tensor_names.POSITIONS}"] *= -1
    found = list(distances(Extension.from_tensors("made", tensors), base))
    assert found[3].weights == pytest.approx(0.25)
    assert found[3].convolution == pytest.approx(3 / math.sqrt(WIDTH))
    assert found[3].positions == pytest.approx(2)
    assert found[4].weights == found[4].convolution == found[4].positions == 0
    assert next(distances(Extension.from_tensors("made", tensors))).weights is None


def test_a_chart_shows_the_tables_rows(base) -> None:
    tensors = Extension.untrained(base, [WIDTH] * 16, FRAMES).tensors()
    table = torch.ones(FRAMES, WIDTH)
    table[FRAMES // 2 :] = -1  # the first half warm, the second cold
    tensors[f"blocks.{tensor_names.BLOCK_IDS[5]}.{tensor_names.POSITIONS}"] = table
    extension = Extension.from_tensors("made", tensors)
    pixels = np.asarray(extension_chart(extension, list(distances(extension)), 5)).astype(int)
    redder = pixels[..., 0] - pixels[..., 2]
    upper, lower = redder[120:260, 80:400], redder[300:440, 80:400]
    assert upper.min() > 50 and lower.max() < -50
    # Frames of one half are alike, those of different halves opposite.
    likeness = redder[:, 516:896]
    assert likeness[120:260, 20:170].min() > 50 and likeness[300:440, 20:170].max() < -50
    other = np.asarray(extension_chart(extension, list(distances(extension)), 4)).astype(int)
    assert not np.array_equal(other[:, :440], pixels[:, :440])


def test_a_sheet_holds_every_picture_in_its_place() -> None:
    rows = [np.full((3, 10, 20, 3), 40 * row, np.uint8) for row in range(4)]
    for row in rows:
        row[2] += 20
    pixels = np.asarray(contact_sheet(rows, list("abcd"), ["0", "1", "2"], edge=40))
    values = [np.unique(pixels[26 + row * 24 + 10, -132:].max(-1)) for row in range(4)]
    for row, found in enumerate(values):
        assert {40 * row, 40 * row + 20} <= set(found.tolist())
    assert (pixels == 20).all(-1).sum() == 40 * 20  # one picture of the first row, scaled to an edge of 40


@pytest.mark.parametrize(
    ("direction", "size"), [("side by side", (12, 16 + 24)), ("one above the other", (12 + 8, 16))]
)
def test_clips_are_put_beside_each_other(direction: str, size: tuple[int, int]) -> None:
    first, second = torch.rand(5, 12, 16, 3), torch.rand(3, 6, 12, 4)
    joined = stack_clips(first, second, direction=direction)
    assert joined.shape == (5, *size, 3)
    assert joined[:, :12, :16].equal(first)
    other = joined[:, :12, 16:] if direction == "side by side" else joined[:, 12:]
    assert other[3].equal(other[2]) and other[4].equal(other[2]) and not other[1].equal(other[2])
    assert other[0].mean().item() == pytest.approx(second[0, ..., :3].mean().item(), abs=0.02)


def test_labels_stand_above_and_odd_sizes_become_even() -> None:
    first, second = torch.zeros(1, 31, 33, 3), torch.zeros(2, 31, 34, 3)
    plain, labelled = stack_clips(first, second), stack_clips(first, second, ("base", ""))
    assert plain.shape == (2, 30, 66, 3) and labelled.shape[0] == 2 and labelled.shape[1] % 2 == 0
    banner = labelled[0, : labelled.shape[1] - 31]
    assert banner[:, :33].std() > 0.05 and banner[:, 33:].std() < 0.01  # text on one side, none on the other
    assert labelled[:, banner.shape[0] + 1 :].abs().max() == 0
