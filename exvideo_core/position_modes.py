"""The ways in which a trained position table serves a clip; apart from the computing, so that nodes load fast."""

from __future__ import annotations

from typing import Literal, get_args

PositionMode = Literal["trained", "stretch", "repeat"]
POSITION_MODES: tuple[PositionMode, ...] = get_args(PositionMode)
