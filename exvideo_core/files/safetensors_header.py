"""Reads and checks the header of a safetensors file, and recognizes other kinds of files."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_MAX_HEADER_BYTES = 100_000_000  # the format's own limit


class ModelFileError(ValueError):
    """A model file cannot be used. The message names the file, the problem and the remedy."""

    def __init__(self, path: str | os.PathLike[str], problem: str, remedy: str) -> None:
        super().__init__(path, problem, remedy)  # all arguments, so that processes can pass it on

    def __str__(self) -> str:
        path, problem, remedy = self.args
        return f"'{os.path.basename(path)}' {problem} {remedy}"


@dataclass(frozen=True)
class Header:
    """Contents of a file, without its tensors.

    Attributes:
        shapes: tensor name -> shape.
        dtypes: tensor name -> dtype, in safetensors' spelling ("F16").
        metadata: the file's metadata.
    """

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    metadata: dict[str, str]


def read_header(path: str | os.PathLike[str]) -> Header:
    """Read and check a safetensors header.

    Raises:
        ModelFileError: the file is missing, corrupted, truncated, or not a safetensors file.
    """
    again = "Download it again and compare its size to the original's."
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            start = file.read(64)
            length = int.from_bytes(start[:8], "little")
            # The format requires that the header starts with a brace.
            if start[8:9] != b"{" or not 2 <= length <= _MAX_HEADER_BYTES:
                raise _not_safetensors(path, start)
            if 8 + length > size:
                raise ModelFileError(path, "is truncated inside its header.", again)
            file.seek(8)
            raw = file.read(length)
    except OSError as error:
        raise ModelFileError(
            path, f"cannot be read: {error.strerror}.", "Check that the file exists and is readable."
        ) from error
    try:
        entries: dict[str, Any] = json.loads(raw, object_pairs_hook=_without_duplicates)
        metadata = dict(entries.pop("__metadata__", None) or {})
        shapes = {name: tuple(int(n) for n in entry["shape"]) for name, entry in entries.items()}
        dtypes = {name: str(entry["dtype"]) for name, entry in entries.items()}
        end = max((int(entry["data_offsets"][1]) for entry in entries.values()), default=0)
    except _DuplicateKey as error:
        raise ModelFileError(path, f"contains the tensor {error} twice.", "Save it again with unique names.") from None
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise ModelFileError(path, "has a corrupted safetensors header.", again) from error
    if 8 + length + end > size:
        raise ModelFileError(path, f"is truncated: it has {size:,} of {8 + length + end:,} bytes.", again)
    _check_with_library(path, again)
    return Header(shapes, dtypes, metadata)


def _check_with_library(path: str | os.PathLike[str], again: str) -> None:
    """Check offsets, dtypes and total size, which loading would otherwise reject later."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise ModelFileError(path, f"is corrupted: {error}.", again) from error


class _DuplicateKey(Exception):
    pass


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise _DuplicateKey(key)
        result[key] = value
    return result


def _known_kind(start: bytes) -> str | None:
    kinds = {
        b"PK\x03\x04": "a PyTorch pickle (.ckpt, .pt, .bin)",
        b"\x80": "a pickle",
        b"version https://git-lfs": "a Git LFS pointer, not the file itself",
        b"<": "a web page, not the file itself",
        b"GGUF": "a GGUF file",
    }
    return next((kind for magic, kind in kinds.items() if start.startswith(magic)), None)


def _not_safetensors(path: str | os.PathLike[str], start: bytes) -> ModelFileError:
    kind = _known_kind(start)
    if kind is not None and "pickle" in kind:
        return ModelFileError(
            path, f"is {kind}, which can run code when it is opened.", "Use the .safetensors version of the model."
        )
    if kind is not None:
        return ModelFileError(path, f"is {kind}.", "Download the .safetensors file again.")
    problem = "is empty." if Path(path).stat().st_size == 0 else "is not a safetensors file."
    return ModelFileError(path, problem, "Download the model again as a .safetensors file.")
