"""Video files: finds usable training videos, reads clips of frames, and writes videos."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..video.images import resize_and_crop
from ..video.writer import VideoWriter
from .config import ConfigError

SUFFIXES = (".mp4", ".mkv", ".webm", ".mov", ".avi", ".m4v", ".gif")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Video:
    """A usable video.

    Attributes:
        path: the file.
        frames: number of frames.
        motion_bucket: motion bucket from metadata.json, or None.
    """

    path: Path
    frames: int
    motion_bucket: int | None


@dataclass(frozen=True)
class Folder:
    """Videos of a folder.

    Attributes:
        videos: usable videos, in a fixed order.
        skipped: (path, reason) of unusable videos.
    """

    videos: tuple[Video, ...]
    skipped: tuple[tuple[Path, str], ...]


def scan(folder: Path, span: int, width: int, height: int) -> Folder:
    """Find the usable videos of a folder.

    If there is a `metadata.json`, which as in the reference is a list of {"path": ..., "motion_bucket_id": ...}, only
    the videos in this list are used. The motion bucket is optional. Otherwise, all videos in the folder and its
    subfolders are used.

    Args:
        folder: the folder.
        span: source frames per training clip; shorter videos are skipped.
        width, height: size of the training clips in pixels; videos smaller than half of it are skipped.

    Returns:
        Usable and skipped videos.

    Raises:
        ConfigError: the folder or its metadata.json cannot be read, or no video is usable.
    """
    if not folder.is_dir():
        raise ConfigError(f"data: {folder} is not a folder.")
    videos, skipped = [], []
    for path, bucket in _listed(folder):
        try:
            frames, found_width, found_height = _probe(path)
        except (OSError, ValueError) as error:
            skipped.append((path, f"cannot be decoded ({error})"))
            continue
        if frames < span:
            skipped.append((path, f"has {frames} frames, but a training clip needs {span}"))
        elif found_width * 2 < width or found_height * 2 < height:
            skipped.append((path, f"is {found_width}x{found_height}, less than half of {width}x{height}"))
        else:
            videos.append(Video(path, frames, bucket))
    for path, reason in skipped:
        _log.warning("Skipped: %s %s.", path, reason)
    if not videos:
        reasons = "; ".join(f"{path.name} {reason}" for path, reason in skipped[:3]) or "it contains no videos"
        raise ConfigError(f"data: no usable videos in {folder} ({len(skipped)} skipped: {reasons}).")
    return Folder(tuple(videos), tuple(skipped))


def _listed(folder: Path) -> Iterator[tuple[Path, int | None]]:
    metadata = folder / "metadata.json"
    if not metadata.exists():
        for path in sorted(folder.rglob("*")):
            if path.suffix.lower() in SUFFIXES:
                yield path, None
        return
    try:
        entries = json.loads(metadata.read_text(encoding="utf-8"))
        pairs = [(folder / entry["path"], entry.get("motion_bucket_id")) for entry in entries]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f'data: {metadata} is not a list of {{"path": ...}} ({error!r}).') from error
    yield from pairs


def _probe(path: Path) -> tuple[int, int, int]:
    """Frames, width and height. Counts packets, because the headers of truncated files are wrong."""
    import av

    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise ValueError("no video stream")
            stream = container.streams.video[0]
            size = stream.codec_context.width, stream.codec_context.height
            frames = sum(1 for packet in container.demux(stream) if packet.size)
    except av.FFmpegError as error:
        raise ValueError(error.strerror or type(error).__name__) from error
    return frames, *size


def read_window(path: Path, start: int, frames: int, interval: int, width: int, height: int) -> torch.Tensor:
    """Decode frames start, start + interval, ... of a video, resized and center-cropped.

    Args:
        path: the video.
        start: index of the first frame.
        frames: number of frames.
        interval: step between frames.
        width, height: size in pixels.

    Returns:
        uint8 [frames, height, width, 3].

    Raises:
        ValueError: the frames cannot be decoded.
    """
    import av

    found = []
    wanted = range(start, start + (frames - 1) * interval + 1, interval)
    try:
        with av.open(str(path)) as container:
            container.streams.video[0].thread_type = "AUTO"
            for index, frame in enumerate(container.decode(video=0)):
                if index in wanted:
                    image = torch.from_numpy(frame.to_ndarray(format="rgb24"))[None]
                    if image.shape[1:3] != (height, width):
                        image = (resize_and_crop(image.float() / 255, width, height) * 255).round().byte()
                    found.append(image)
                    if len(found) == frames:
                        break
    except (av.FFmpegError, OSError) as error:
        raise ValueError(f"{path} cannot be decoded: {error}") from error
    if len(found) < frames:
        raise ValueError(f"{path} ends {frames - len(found)} frames early.")
    return torch.cat(found)


def write_video(path: Path, frames: np.ndarray, fps: int, lossless: bool = False) -> None:
    """Write a video file atomically.

    Args:
        path: the file.
        frames: uint8 [T, H, W, 3].
        fps: frames per second.
        lossless: encode as FFV1 (.mkv) instead of H.264 (.mp4).
    """
    with VideoWriter(path, fps, "ffv1 (lossless)" if lossless else "h264") as writer:
        writer.add(frames)
