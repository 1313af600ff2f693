"""Writes video files frame by frame, atomically."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ..choices import CODECS
from ..files.output_file import begin, discard, explain_errors, finish

if TYPE_CHECKING:
    import av
    import numpy as np


_BT709 = 1  # FFmpeg's code for primaries, transfer characteristics and matrix


def frame_rate(fps: float | Fraction) -> Fraction:
    """Frame rate as a fraction, as stored in a video file.

    23.976, 29.97 and 59.94 become the exact NTSC rates, 24, 30 and 60 times 1000/1001: with rounded rates, video drifts
    from sound by a frame in 12 hours.

    Raises:
        ValueError: fps is not a positive, finite number.
    """
    if not math.isfinite(fps) or fps <= 0:
        raise ValueError(f"fps ({fps}) has to be a positive number.")
    ntsc = Fraction(round(fps * 1.001) * 1000, 1001)
    if math.isclose(fps, ntsc, rel_tol=2e-6) and ntsc:
        return ntsc
    return Fraction(fps).limit_denominator()


class VideoWriter:
    """A context that writes a video file. The file gets its name when the context exits without an error.

    After an error nothing is left behind, and if the process is killed, only a temporary file.

    Args:
        path: the file, with the codec's suffix.
        fps: frames per second, see `frame_rate`.
        codec: key of `CODECS`.
        quality: constant rate factor, 0 to 51 (vp9: up to 63).
        metadata: written to the container.

    Raises:
        ValueError: fps is not positive, a frame differs in size from the first one, or the codec does not support it.
        OutputFileError: the file cannot be written. Entering the context finds most problems.
    """

    def __init__(
        self,
        path: Path,
        fps: float | Fraction,
        codec: str = "h264",
        quality: int = 12,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.path = path
        self._codec, self._fps, self._quality = CODECS[codec], frame_rate(fps), quality
        self._metadata = dict(metadata or {})
        self._container: Any = None
        self._stream: av.VideoStream | None = None
        self._size: tuple[int, int] | None = None

    def __enter__(self) -> VideoWriter:
        import av

        options = {"movflags": "use_metadata_tags+faststart"} if self.path.suffix == ".mp4" else {}
        self._part = begin(self.path)
        try:
            with explain_errors(self.path):
                self._container = av.open(str(self._part), "w", container_options=options)
            self._container.metadata.update(self._metadata)
        except BaseException:
            discard(self._part)
            raise
        return self

    def add(self, frames: np.ndarray) -> None:
        """Append frames.

        Args:
            frames: contiguous uint8 [N, H, W, 3].
        """
        import av
        from av.video.reformatter import Colorspace

        if self._stream is None:
            self._begin(frames.shape[1], frames.shape[2])
        if frames.shape[1:3] != self._size:
            size = f"{frames.shape[2]}x{frames.shape[1]}"
            raise ValueError(
                f"All frames of a video need the same size, but {self.path.name} got one of {size} pixels."
            )
        assert self._stream is not None
        for pixels in frames:
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            if self._codec.pixel_format.startswith("yuv"):
                frame = frame.reformat(format=self._codec.pixel_format, dst_colorspace=Colorspace.ITU709)
            with explain_errors(self.path):
                self._container.mux(self._stream.encode(frame))

    def _begin(self, height: int, width: int) -> None:
        if self._codec.pixel_format == "yuv420p" and (height % 2 or width % 2):
            raise ValueError(
                f"{self._codec.encoder} cannot encode {width}x{height} pixels: width and height have to be even."
            )
        if min(height, width) < self._codec.min_size:
            smallest = f"{self._codec.min_size}x{self._codec.min_size}"
            raise ValueError(
                f"{self._codec.encoder} needs at least {smallest} pixels, but the video has {width}x{height}."
            )
        stream = self._container.add_stream(self._codec.encoder, rate=self._fps)
        stream.height, stream.width = self._size = (height, width)
        stream.pix_fmt = self._codec.pixel_format
        stream.options = {name: value.format(quality=self._quality) for name, value in self._codec.options.items()}
        if self._codec.pixel_format.startswith("yuv"):
            context = stream.codec_context
            context.color_primaries = context.color_trc = context.colorspace = _BT709
        self._stream = stream

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        complete = kind is None and self._stream is not None
        try:
            # After an error, closing may fail as well; only the first error matters.
            with explain_errors(self.path) if complete else contextlib.suppress(Exception):
                if complete:
                    self._container.mux(self._stream.encode())
                self._container.close()
            if complete:
                finish(self._part, self.path)
        finally:
            self._container = self._stream = None  # releases the file even if closing failed
            discard(self._part)
