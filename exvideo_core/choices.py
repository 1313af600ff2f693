"""What users choose between; apart from the computing, so that nodes load fast."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

#: How a trained position table serves a clip.
PositionMode = Literal["trained", "stretch", "repeat"]
POSITION_MODES: tuple[PositionMode, ...] = get_args(PositionMode)

#: How decoded chunks are blended where they overlap.
Blend = Literal["smooth", "linear"]
BLENDS: tuple[Blend, ...] = get_args(Blend)


#: How windows of frames become one clip: one after the other, or all at each step and averaged by these weights.
Fuse = Literal["sequential", "pyramid", "overlap-linear", "flat"]
FUSES: tuple[Fuse, ...] = get_args(Fuse)

#: What a window past the first is given as its first picture.
Anchor = Literal["window start", "first picture", "none"]
ANCHORS: tuple[Anchor, ...] = get_args(Anchor)


#: Where the second of two compared clips is put.
Direction = Literal["side by side", "one above the other"]
DIRECTIONS: tuple[Direction, ...] = get_args(Direction)


@dataclass(frozen=True)
class Codec:
    """How frames are stored in a video file.

    Attributes:
        encoder: FFmpeg's name of it.
        suffix: of the file, which decides the container.
        pixel_format: FFmpeg's name of it.
        options: the encoder's own, `{quality}` being put in.
        smallest: width and height in pixels that it takes.
    """

    encoder: str
    suffix: str
    pixel_format: str
    options: Mapping[str, str]
    smallest: int = 2


#: By the names that users see. Quality is each encoder's constant rate factor: lower is better and larger.
CODECS: Mapping[str, Codec] = {
    "h264": Codec("libx264", ".mp4", "yuv420p", {"crf": "{quality}"}),
    # x265 writes past its buffers where a picture is narrower than its largest block.
    "h265": Codec("libx265", ".mp4", "yuv420p", {"crf": "{quality}", "x265-params": "log-level=error"}, smallest=64),
    "vp9": Codec("libvpx-vp9", ".webm", "yuv420p", {"crf": "{quality}", "b": "0"}),
    "ffv1 (lossless)": Codec("ffv1", ".mkv", "bgr0", {}),
}
