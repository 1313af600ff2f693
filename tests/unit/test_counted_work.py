"""The counts of `bench work`, against sums by hand."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from benchmarks.counted_work import ATTENTION, CONVOLUTION, LINEAR, CardKernels, Work


def test_products_and_bytes() -> None:
    x, weight, bias = torch.ones(5, 8), torch.ones(16, 8), torch.ones(16)
    picture, filters = torch.ones(2, 3, 6, 6), torch.ones(4, 3, 3, 3)
    with Work() as work:
        functional.linear(x, weight, bias)
        functional.conv2d(picture, filters, padding=1)
    assert work.by_kind == {LINEAR: 2 * 5 * 8 * 16, CONVOLUTION: 2 * (2 * 4 * 6 * 6) * (3 * 3 * 3), ATTENTION: 0}
    assert work.by_operator["addmm"].read == 4 * (40 + 128 + 16)
    assert work.by_operator["convolution"].written == 4 * 2 * 4 * 36
    assert work.total.calls == 2


def test_views_are_free_and_expanded_tensors_lie_in_memory_once() -> None:
    x, row = torch.ones(4, 10), torch.ones(10)
    with Work() as work:
        x.t().view(5, 2, 4).unflatten(0, (1, 5))[0].expand(3, -1, -1, -1)
        torch.empty_like(x)
        assert not work.by_operator
        x + row.expand(4, 10)
    assert work.total.read == 4 * (40 + 10)
    assert work.total.written == 4 * 40


def test_what_is_changed_in_place_is_read_and_what_is_overwritten_is_not() -> None:
    x, y = torch.ones(10), torch.ones(10)
    with Work() as work:
        x.mul_(y)
        x.copy_(y)
        torch.add(x, y, out=x)
        x.zero_()
    found = {name: (total.read, total.written) for name, total in work.by_operator.items()}
    assert found == {"mul_": (80, 40), "copy_": (40, 40), "add": (80, 40), "zero_": (0, 40)}


def test_attention_is_one_operator_whose_result_needs_no_copy_to_join_heads() -> None:
    query, key = torch.ones(2, 3, 5, 8), torch.ones(2, 3, 7, 8)
    with Work() as work, CardKernels(work):
        out = functional.scaled_dot_product_attention(query, key, key)
        joined = out.transpose(1, 2).flatten(2)
    assert joined.shape == (2, 5, 24)
    assert list(work.by_operator) == ["scaled_dot_product_attention"]
    assert work.by_kind[ATTENTION] == 2 * 2 * (2 * 3 * 5 * 7 * 8)


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_cards_group_norm_copies_what_is_in_channels_last(channels_last: bool) -> None:
    x = torch.ones(2, 32, 4, 4)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    with Work() as work, CardKernels(work):
        assert functional.group_norm(x, 8).is_contiguous()
    assert ("clone" in work.by_operator) == channels_last


@pytest.mark.parametrize(
    ("channels_last", "moved"),
    # Both in channels last: nothing. Filters alone in channels first: these, read and written. Both: the result too.
    [((True, True), 0), ((True, False), 2 * 4 * 576), ((False, False), 2 * 4 * (512 + 576 + 512))],
)
def test_changes_of_layout_around_convolutions(channels_last: tuple[bool, bool], moved: int) -> None:
    tensors = torch.ones(2, 8, 8, 4), torch.ones(8, 8, 3, 3)
    formats = [torch.channels_last if last else torch.contiguous_format for last in channels_last]
    x, filters = (t.contiguous(memory_format=f) for t, f in zip(tensors, formats, strict=True))
    with Work() as work:
        functional.conv2d(x, filters, torch.ones(8), padding=1)
    assert work.layout == moved
    assert work.by_operator["convolution's bias"].moved == 2 * 4 * 512
