"""Denoising in overlapping tiles of the images, as wrappers of ComfyUI's sampling."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import comfy.model_base
import comfy.model_management
import torch
from comfy.patcher_extension import WrappersMP

from ...video.windows import fuse_weights, split_windows
from ..model import check_svd
from ..wrappers import limit_estimate, set_wrapper
from .conditions import Condition, SamplingState, Tile

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

_KEY = "exvideo_tiles"


@dataclass(frozen=True)
class TileSettings:
    """Size and overlap of tiles, in latent pixels."""

    width: int
    height: int
    overlap: int

    def split(self, height: int, width: int) -> tuple[list[list[int]], list[list[int]]]:
        """Rows and columns of the tiles that cover an image.

        Args:
            height, width: of the image, in latent pixels.

        Returns:
            (rows of each line of tiles, columns of each column of tiles), as of `split_windows`.
        """
        overlaps = [min(self.overlap, size - 1) for size in (self.height, self.width)]
        return split_windows(height, self.height, overlaps[0]), split_windows(width, self.width, overlaps[1])


def with_tiles(model: ModelPatcher, tiles: TileSettings) -> ModelPatcher:
    """A clone of an SVD model that denoises images larger than a tile in tiles, blended at every step.

    Raises:
        ValueError: the model is not an SVD model.
    """
    check_svd(model)
    patched = model.clone()
    state = SamplingState()

    def clear_state(executor: Any, *args: Any, **kwargs: Any) -> torch.Tensor:  # noqa: ANN401 - ComfyUI's
        try:
            return executor(*args, **kwargs)
        finally:
            state.clear()

    set_wrapper(patched, WrappersMP.OUTER_SAMPLE, _KEY, clear_state)
    set_wrapper(patched, WrappersMP.CALC_COND_BATCH, _KEY, _average_tiles(tiles, state), first=False)
    set_wrapper(patched, WrappersMP.PREPARE_SAMPLING, _KEY, limit_estimate(height=tiles.height, width=tiles.width))
    return patched


def _average_tiles(settings: TileSettings, state: SamplingState) -> Callable[..., list[torch.Tensor]]:
    """CALC_COND_BATCH wrapper: denoises all tiles of a call and averages them where they overlap."""

    def wrapper(
        executor: Any,  # noqa: ANN401 - ComfyUI's
        model: comfy.model_base.BaseModel,
        conds: list[list[Condition] | None],
        x: torch.Tensor,
        timestep: torch.Tensor,
        options: dict[str, Any],
    ) -> list[torch.Tensor]:
        rows, columns = settings.split(*x.shape[-2:])
        if len(rows) == len(columns) == 1:
            return executor(model, conds, x, timestep, options)
        sums = [torch.zeros_like(x) for _ in conds]
        weight_sum = x.new_zeros(x.shape[-2:])
        for r, row in enumerate(rows):
            for c, column in enumerate(columns):
                comfy.model_management.throw_exception_if_processing_interrupted()
                tile = Tile(row[0], column[0], len(row), len(column), (x.shape[-2], x.shape[-1]))
                sliced = [
                    None
                    if group is None
                    else [own for cond in group if (own := tile.slice_condition(cond, state.controls))]
                    for group in conds
                ]
                own_options = state.easy_caches.options(options, tile, model.model_sampling)
                results = executor(model, sliced, tile.crop(x).contiguous(), timestep, own_options)
                down, across = fuse_weights(rows, r, "overlap-linear"), fuse_weights(columns, c, "overlap-linear")
                weights = (down[:, None] * across).to(x)
                for total, result in zip(sums, results, strict=True):
                    tile.crop(total).add_(result * weights)
                tile.crop(weight_sum).add_(weights)
        return [total.div_(weight_sum) for total in sums]

    return wrapper
