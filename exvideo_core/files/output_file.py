"""Files that appear whole or not at all, and what to do where the disk refuses them."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

_ANOTHER_FOLDER = "or choose another output folder (ComfyUI's --output-directory)"
_FULL = ("the disk is full", f"Free up some space, {_ANOTHER_FOLDER}, and queue the workflow again.")
_FORBIDDEN = (
    "permission to write to its folder is denied",
    f"Give the user that runs ComfyUI write access, {_ANOTHER_FOLDER}.",
)
_IN_THE_WAY = ("a folder has this name, or a file has its folder's name", "Choose another filename_prefix.")
_HELD = (
    "a file with this name is open in another program or write-protected",
    "Close that program or choose another filename_prefix, then queue the workflow again.",
)
#: What is wrong and what to do, by the numbers of errors.
_REASONS = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EFBIG: (
        "the file is too large for this disk's file system",
        f"Make the file smaller, {_ANOTHER_FOLDER} on another disk.",
    ),
    errno.EROFS: _FORBIDDEN,
    errno.EACCES: _FORBIDDEN,
    errno.EPERM: _FORBIDDEN,
    errno.EISDIR: _IN_THE_WAY,
    errno.ENOTDIR: _IN_THE_WAY,
    errno.EEXIST: _IN_THE_WAY,
    errno.EINVAL: ("the operating system does not allow this name", "Choose another filename_prefix."),
    errno.ENAMETOOLONG: ("its name is too long", "Choose a shorter filename_prefix."),
    errno.EIO: ("the disk reported an error", f"Check the disk and its connection, {_ANOTHER_FOLDER}."),
    errno.ENOENT: ("its folder no longer exists", "Check the output folder and queue the workflow again."),
}


class OutputFileError(OSError):
    """A file cannot be written: the message names the file, what is wrong and what to do."""

    def __init__(self, path: str | os.PathLike[str], problem: str, remedy: str) -> None:
        super().__init__(f"'{os.fspath(path)}' cannot be written: {problem}. {remedy}")


@contextlib.contextmanager
def explain_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Say of a disk's refusal within the block which file it concerns, and what to do. Other errors pass.

    Raises:
        OutputFileError: the disk refused.
    """
    try:
        yield
    except OutputFileError:
        raise
    except OSError as error:  # FFmpeg's are among them where they are of a disk
        if error.errno not in _REASONS:
            raise
        raise OutputFileError(path, *_REASONS[error.errno]) from error


def begin(path: Path) -> Path:
    """Make the folder of a file, and the part of it that is written first, still empty.

    What makes a file cost minutes is computed after this: a folder that cannot be written to is found before.

    Returns:
        The part, for `finish` or `discard`.

    Raises:
        OutputFileError: there can be no file of this name.
    """
    part = path.with_name(f".{path.stem}.part{path.suffix}")
    with explain_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        part.open("wb").close()
    return part


def finish(part: Path, path: Path) -> None:
    """Give a finished part its name, in place of what had it.

    Raises:
        OutputFileError: another program holds a file of that name, or a folder has it.
    """
    try:
        with explain_errors(path):
            os.replace(part, path)
    except OutputFileError as error:
        # Windows refuses to replace a file that is open; the folder itself has just been written to.
        if isinstance(error.__cause__, PermissionError) and path.is_file():
            raise OutputFileError(path, *_HELD) from error.__cause__
        raise


def discard(part: Path) -> None:
    """Remove a part if it is still there. Where that fails, what happened before is what is told."""
    with contextlib.suppress(OSError):
        part.unlink(missing_ok=True)
