"""Pictures and latents of other kinds: what serves is taken, what does not is refused by name."""

from __future__ import annotations

import pytest
import torch

from exvideo_core.video import charts
from exvideo_core.video.images import resize_and_crop
from exvideo_core.video.latents import check_latents


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_pictures_of_any_type_and_kind_are_taken(dtype: torch.dtype, channels: int) -> None:
    image = torch.rand(2, 10, 14, channels)
    made = resize_and_crop(image.to(dtype), 8, 8)
    assert made.dtype == torch.float32 and made.shape == (2, 8, 8, 3)
    whole = image[..., :3] if channels > 1 else image.repeat(1, 1, 1, 3)
    assert (made - resize_and_crop(whole, 8, 8)).abs().max() < 4 * torch.finfo(dtype).eps
    assert charts.stack_clips(image.to(dtype), torch.rand(1, 6, 6, 3).to(dtype)).dtype == torch.float32


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.rand(0, 4, 4, 3), "image contains no image"),
        (torch.rand(4, 4, 3), "image contains no image"),
        (torch.rand(1, 4, 4, 2), "image has 2 channels"),
        (torch.full((1, 4, 4, 3), float("nan")), "image contains NaN or infinite"),
        (torch.full((1, 4, 4, 3), float("inf")), "image contains NaN or infinite"),
    ],
)
def test_pictures_that_are_none_are_refused(image: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resize_and_crop(image, 8, 8)


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (torch.zeros(1, 16, 3, 4, 4), "expected \\[frames, channels"),
        (torch.zeros(0, 4, 4, 4), "expected \\[frames, channels"),
        (torch.zeros(1, 16, 4, 4), "16 channels, but SVD's have 4"),
        (torch.full((1, 4, 4, 4), float("nan")), "sampling has diverged"),
    ],
)
def test_latents_of_other_models_are_refused(samples: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_latents(samples, 4)
