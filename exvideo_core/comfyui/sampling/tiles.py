"""Denoising in tiles of pictures, as a wrapper of the host's sampling."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import comfy.model_base
import comfy.model_management
import torch
from comfy.patcher_extension import WrappersMP

from ...video.windows import fuse_weights, spans
from ..wrappers import check_svd, room_for, wrap
from .conditions import Parts, Tile

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

_KEY = "exvideo_tiles"


@dataclass(frozen=True)
class Tiles:
    """Size and overlap of tiles, in latent pixels."""

    width: int
    height: int
    overlap: int

    def of(self, height: int, width: int) -> tuple[list[list[int]], list[list[int]]]:
        overlaps = [min(self.overlap, size - 1) for size in (self.height, self.width)]
        return spans(height, self.height, overlaps[0]), spans(width, self.width, overlaps[1])


def with_tiles(model: ModelPatcher, tiles: Tiles) -> ModelPatcher:
    """A clone of an SVD model whose pictures, where larger than a tile, are denoised in tiles and blended every step.

    Raises:
        ValueError: the model is no SVD.
    """
    check_svd(model)
    patched = model.clone()
    parts = Parts()

    def for_a_sampling(executor: Any, *given: Any, **named: Any) -> torch.Tensor:  # noqa: ANN401 - the host's
        try:
            return executor(*given, **named)
        finally:
            parts.clear()

    wrap(patched, WrappersMP.OUTER_SAMPLE, _KEY, for_a_sampling)
    wrap(patched, WrappersMP.CALC_COND_BATCH, _KEY, _tiled(tiles, parts), first=False)
    wrap(patched, WrappersMP.PREPARE_SAMPLING, _KEY, room_for(height=tiles.height, width=tiles.width))
    return patched


def _tiled(settings: Tiles, parts: Parts) -> Callable[..., list[torch.Tensor]]:
    """All tiles of a call, blended where they overlap."""

    def wrapper(
        executor: Any,  # noqa: ANN401 - the host's
        model: comfy.model_base.BaseModel,
        conds: list[list[dict[str, Any]] | None],
        x: torch.Tensor,
        timestep: torch.Tensor,
        options: dict[str, Any],
    ) -> list[torch.Tensor]:
        rows, columns = settings.of(*x.shape[-2:])
        if len(rows) == len(columns) == 1:
            return executor(model, conds, x, timestep, options)
        sums = [torch.zeros_like(x) for _ in conds]
        shares = x.new_zeros(x.shape[-2:])
        for r, row in enumerate(rows):
            for c, column in enumerate(columns):
                comfy.model_management.throw_exception_if_processing_interrupted()
                tile = Tile(row[0], column[0], len(row), len(column), (x.shape[-2], x.shape[-1]))
                given = [
                    None if cond is None else [own for each in cond if (own := tile.cut(each, parts.controls))]
                    for cond in conds
                ]
                own_options = parts.caches.of(options, tile, model.model_sampling)
                made = executor(model, given, tile.of(x).contiguous(), timestep, own_options)
                down, across = fuse_weights(rows, r, "overlap-linear"), fuse_weights(columns, c, "overlap-linear")
                weights = (down[:, None] * across).to(x)
                for total, result in zip(sums, made, strict=True):
                    tile.of(total).add_(result * weights)
                tile.of(shares).add_(weights)
        return [total.div_(shares) for total in sums]

    return wrapper
