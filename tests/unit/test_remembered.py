"""Shapes of hollow cards that are worked out once, against PyTorch's own."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from runner.simulated_card import remembered

META = torch.device("meta")


def _picture() -> torch.Tensor:
    return torch.empty(2, 8, 4, 6, device=META).contiguous(memory_format=torch.channels_last)


CALLS = [
    ("add", torch.add, lambda: (_picture(), torch.empty(8, 1, 1, device=META)), {}),
    ("mul", torch.mul, lambda: (_picture(), 2), {}),
    ("mul", torch.mul, lambda: (torch.empty(3, device=META, dtype=torch.int64), 2.0), {}),
    ("conv2d", functional.conv2d, lambda: (_picture(), torch.empty(4, 8, 3, 3, device=META)), {"padding": 1}),
    ("cat", torch.cat, lambda: ([_picture(), _picture()],), {"dim": 1}),
    ("linear", functional.linear, lambda: (_picture(), torch.empty(5, 6, device=META)), {}),
    ("contiguous", torch.Tensor.contiguous, lambda: (_picture(),), {}),
    ("mean", torch.mean, lambda: (_picture(), (2, 3)), {"keepdim": True}),
]


@pytest.mark.parametrize(("name", "func", "arguments", "named"), CALLS)
def test_the_second_result_is_that_of_pytorch(name, func, arguments, named) -> None:
    expected = func(*arguments(), **named)
    for _ in range(2):
        found = remembered.run(func, name, arguments(), named)
        assert (found.shape, found.stride(), found.dtype) == (expected.shape, expected.stride(), expected.dtype)


def test_views_stay_views() -> None:
    for _ in range(2):
        x = torch.empty(4, 6, device=META)
        found = remembered.run(torch.flatten, "flatten", (x,), {})
        assert found.untyped_storage()._cdata == x.untyped_storage()._cdata


def test_what_is_changed_in_place_is_given_back() -> None:
    for _ in range(2):
        x, out = torch.empty(4, device=META), torch.empty(4, device=META)
        assert remembered.run(torch.Tensor.mul_, "mul_", (x, 2), {}) is x
        assert remembered.run(functional.silu, "silu", (x,), {"inplace": True}) is x
        assert remembered.run(torch.add, "add", (x, x), {"out": out}) is out
