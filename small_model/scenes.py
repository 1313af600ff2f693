"""Batches of clips of the synthetic world, as tensors on any device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from . import world


@dataclass(frozen=True)
class Scenes:
    """The fields of many `world.Clip`s, stacked.

    Attributes:
        x, y: centers at frame 0 [N, LANES].
        disk: the shape is a disk, not a square [N, LANES].
        color: of each shape, 0..1 [N, LANES, 3].
        heading: 1 or -1 [N, LANES].
        bucket: motion buckets [N].
        speed: picture widths per frame [N].
    """

    x: torch.Tensor
    y: torch.Tensor
    disk: torch.Tensor
    color: torch.Tensor
    heading: torch.Tensor
    bucket: torch.Tensor
    speed: torch.Tensor

    @classmethod
    def of(cls, clips: Sequence[world.Clip], device: torch.device | str = "cpu") -> Scenes:
        colors = np.array(list(world.COLORS.values()))

        def stacked(values: list[np.ndarray] | list[float]) -> torch.Tensor:
            return torch.from_numpy(np.array(values, dtype=np.float32)).to(device)

        return cls(
            x=stacked([clip.x for clip in clips]),
            y=stacked([clip.y for clip in clips]),
            disk=stacked([clip.kind == 0 for clip in clips]).bool(),
            color=stacked([colors[clip.color] for clip in clips]),
            heading=stacked([clip.heading for clip in clips]),
            bucket=stacked([clip.motion_bucket for clip in clips]),
            speed=stacked([clip.speed for clip in clips]),
        )

    def __getitem__(self, chosen: slice | torch.Tensor) -> Scenes:
        return Scenes(**{name: value[chosen] for name, value in vars(self).items()})

    def __len__(self) -> int:
        return len(self.x)

    def centers(self, frames: torch.Tensor) -> torch.Tensor:
        """True centers along x [N, T, LANES] at frame numbers [T] or [N, T]."""
        span = world.RIGHT - world.LEFT
        start = torch.where(self.heading > 0, self.x - world.LEFT, world.LEFT - self.x)
        walked = (self.speed[:, None] * frames)[..., None]
        phase = (start[:, None] + walked) % (2 * span)
        return world.LEFT + torch.where(phase <= span, phase, 2 * span - phase)

    def draw(self, centers: torch.Tensor, size: int = world.SIZE) -> torch.Tensor:
        """Draw the shapes at given centers along x [N, T, LANES], like `world.draw`.

        Returns:
            0..1 [N, T, 3, size, size].
        """
        grid = (torch.arange(size, device=centers.device) + 0.5) / size
        rows = torch.linspace(*world.BACKGROUND, size, device=centers.device)
        video = rows[:, None].expand(*centers.shape[:2], 3, size, size)
        for lane in range(world.LANES):
            dx = (grid - centers[:, :, lane, None]).abs()[:, :, None, :]
            dy = (grid - self.y[:, None, lane, None]).abs()[:, :, :, None]
            distance = torch.where(
                self.disk[:, lane, None, None, None], torch.hypot(dx, dy), torch.maximum(dx, dy) * world.SQUARE_SCALE
            )
            cover = ((world.RADIUS - distance) * size + 0.5).clamp(0, 1)[:, :, None]
            video = video + cover * (self.color[:, None, lane, :, None, None] - video)
        return video


def as_read(video: torch.Tensor) -> torch.Tensor:
    """Convert frames in 0..1 to -1..1, rounded to 8 bits like the frames of a video file."""
    return (video * 255).round() / 127.5 - 1
