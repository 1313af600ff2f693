"""The choices that nodes offer. Without heavy imports, so that nodes load fast."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

#: How trained positions are assigned to the frames of a video.
PositionMode = Literal["trained", "stretch", "repeat"]
POSITION_MODES: tuple[PositionMode, ...] = get_args(PositionMode)

#: How decoded segments are blended where they overlap.
Blend = Literal["smooth", "linear"]
BLENDS: tuple[Blend, ...] = get_args(Blend)

#: How windows are combined: one after the other, or all at every step, averaged with these weights.
Fuse = Literal["sequential", "pyramid", "overlap-linear", "flat"]
FUSES: tuple[Fuse, ...] = get_args(Fuse)

#: The image that every window but the first is conditioned on as its first frame.
Anchor = Literal["window start", "first picture", "none"]
ANCHORS: tuple[Anchor, ...] = get_args(Anchor)

#: How post-tuning draws noise levels: from the published ramp, from an interval, or log-normally.
NoiseKind = Literal["ramp", "interval", "lognormal"]

#: What post-tuning trains for: the published denoising loss, or step distillation.
Objective = Literal["denoise", "distill"]

#: How far the teacher of a step distillation goes: one step, or to the end of a phase.
DistillTarget = Literal["consistency", "progressive"]

#: How two videos are arranged for comparison.
Direction = Literal["side by side", "one above the other"]
DIRECTIONS: tuple[Direction, ...] = get_args(Direction)


@dataclass(frozen=True)
class Codec:
    """Encoder and container of a video file.

    Attributes:
        encoder: FFmpeg's name for the encoder.
        suffix: file suffix, which determines the container.
        pixel_format: FFmpeg's name for the pixel format.
        options: options of the encoder; `{quality}` is filled in.
        min_size: smallest width and height, in pixels, that the encoder supports.
    """

    encoder: str
    suffix: str
    pixel_format: str
    options: Mapping[str, str]
    min_size: int = 2


#: Codecs by the names that users see. Quality is the constant rate factor: lower means better and larger.
CODECS: Mapping[str, Codec] = {
    "h264": Codec("libx264", ".mp4", "yuv420p", {"crf": "{quality}"}),
    # x265 writes past its buffers if a frame is narrower than its largest block.
    "h265": Codec("libx265", ".mp4", "yuv420p", {"crf": "{quality}", "x265-params": "log-level=error"}, min_size=64),
    "vp9": Codec("libvpx-vp9", ".webm", "yuv420p", {"crf": "{quality}", "b": "0"}),
    "ffv1 (lossless)": Codec("ffv1", ".mkv", "bgr0", {}),
}
