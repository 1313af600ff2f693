"""Frame positions: sinusoidal, ping-pong and trained, and trained tables for other numbers of frames."""

from __future__ import annotations

import math

import torch

from ..choices import PositionMode

#: Positions of a video's first frames, to which the ping-pong never returns.
_LEAD_IN = 5


def sinusoidal(positions: torch.Tensor, channels: int) -> torch.Tensor:
    """Sinusoidal embedding of positions, cosines first (SVD's `timestep_embedding` with period 10,000).

    Args:
        positions: frame positions [T].
        channels: width C.

    Returns:
        [T, C] in float32.
    """
    half = channels // 2
    frequencies = torch.exp(-math.log(10000.0) * torch.arange(half, dtype=torch.float32) / half)
    angles = positions.to(torch.float32)[:, None] * frequencies
    table = torch.cat([angles.cos(), angles.sin()], dim=-1)
    return torch.nn.functional.pad(table, (0, channels - 2 * half))


def ping_pong(frames: int, trained: int = 25) -> torch.Tensor:
    """Row of a table with `trained` rows for each frame: up to the last row, then down and up again.

    Reference: `PositionalID`. With 25 rows it turns around at rows 24 and 4, so that the first rows belong only to a
    video's beginning. For other lengths, the lower turning point stays at row 4; tables of up to 5 rows alternate
    between their last two.

    Returns:
        int64 [frames], values in 0..trained-1.
    """
    sweep = max(trained - _LEAD_IN, 1)
    rows = []
    for frame in range(frames):
        step = (frame - trained) % (2 * sweep)
        if frame < trained:
            rows.append(frame)
        elif step < sweep:
            rows.append(max(trained - 2 - step, 0))
        else:
            rows.append(trained - 2 * sweep + step)
    return torch.tensor(rows, dtype=torch.int64)


def table_for(table: torch.Tensor, frames: int, mode: PositionMode) -> torch.Tensor:
    """Positions for a video of any length from a trained table.

    Args:
        table: trained positions [F, C].
        frames: length T of the video.
        mode: `trained` takes the first T rows, `stretch` resamples all rows linearly to T, `repeat` continues in
            `ping_pong` order after the last row.

    Returns:
        [T, C] in the table's dtype.

    Raises:
        ValueError: the mode is `trained` and T is greater than F.
    """
    trained = table.shape[0]
    if mode == "stretch":
        # In float32: half precision cannot represent the fractional row numbers of a long video.
        rows = table.float().T[None]
        return torch.nn.functional.interpolate(rows, size=frames, mode="linear", align_corners=True)[0].T.to(table)
    if mode == "repeat":
        return table[ping_pong(frames, trained).to(table.device)]
    if frames > trained:
        raise ValueError(
            f"The video has {frames} frames, but this ExVideo extension was trained for {trained}. Lower the frame "
            f"count to {trained}, add ExVideo Windows after ExVideo Apply, or set positions of ExVideo Apply to "
            "'stretch' or 'repeat'."
        )
    return table[:frames]


def blended_table(table: torch.Tensor, frames: int, mode: PositionMode, strength: float) -> torch.Tensor:
    """`table_for`, interpolated with the base's sinusoidal positions.

    Args:
        table: trained positions [F, C].
        frames: length T of the video.
        mode: as in `table_for`.
        strength: share of the trained positions.

    Returns:
        strength x trained + (1 - strength) x sinusoidal [T, C].

    Raises:
        ValueError: as `table_for`, unless strength is 0.
    """
    if strength == 0.0:  # the base accepts any length
        return sinusoidal(torch.arange(frames), table.shape[1]).to(table.device)
    trained = table_for(table, frames, mode)
    if strength == 1.0:
        return trained
    base = sinusoidal(torch.arange(frames), table.shape[1]).to(trained.device)
    return torch.lerp(base, trained.float(), strength)
