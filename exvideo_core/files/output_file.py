"""Writes output files atomically, and explains disk errors."""

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
_IN_USE = (
    "a file with this name is open in another program or write-protected",
    "Close that program or choose another filename_prefix, then queue the workflow again.",
)
#: Problem and remedy by error number.
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
    """A file cannot be written. The message names the file, the problem and the remedy."""

    def __init__(self, path: str | os.PathLike[str], problem: str, remedy: str) -> None:
        super().__init__(f"'{os.fspath(path)}' cannot be written: {problem}. {remedy}")


@contextlib.contextmanager
def explain_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn disk errors raised within this context into `OutputFileError`. Other errors pass through.

    Raises:
        OutputFileError: the file could not be written.
    """
    try:
        yield
    except OutputFileError:
        raise
    except OSError as error:  # includes FFmpeg's disk errors
        if error.errno not in _REASONS:
            raise
        raise OutputFileError(path, *_REASONS[error.errno]) from error


def begin(path: Path) -> Path:
    """Create an empty temporary file next to `path`, and its folder.

    Call this before minutes of computation, to find out early if the folder cannot be written to.

    Returns:
        Path of the temporary file, for `finish` or `discard`.

    Raises:
        OutputFileError: a file of this name cannot be created.
    """
    part = path.with_name(f".{path.stem}.part{path.suffix}")
    with explain_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        part.open("wb").close()
    return part


def finish(part: Path, path: Path) -> None:
    """Move a finished temporary file to `path`, replacing an existing file.

    Raises:
        OutputFileError: another program has the existing file open, or a folder has this name.
    """
    try:
        with explain_errors(path):
            os.replace(part, path)
    except OutputFileError as error:
        # The folder is writable, since `part` is in it. Windows does not replace files that are open.
        if isinstance(error.__cause__, PermissionError) and path.is_file():
            raise OutputFileError(path, *_IN_USE) from error.__cause__
        raise


def discard(part: Path) -> None:
    """Remove a temporary file if it still exists. Errors are ignored, so that they do not hide an earlier one."""
    with contextlib.suppress(OSError):
        part.unlink(missing_ok=True)
