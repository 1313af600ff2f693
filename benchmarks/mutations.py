"""Mutations that corrupt or alter a valid safetensors file."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_SIZES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "U8": 1, "I8": 1, "BOOL": 1}


@dataclass
class Parts:
    """Contents of a safetensors file.

    Attributes:
        header: tensor name -> its entry, and `__metadata__`.
        data: data after the header.
        hollow: number of zero bytes at the end, stored as a hole in a sparse file.
    """

    header: dict[str, Any]
    data: bytearray
    hollow: int = 0

    @classmethod
    def read(cls, path: Path) -> Parts:
        """Read a file."""
        raw = path.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        return cls(json.loads(raw[8 : 8 + length]), bytearray(raw[8 + length :]))

    @property
    def names(self) -> list[str]:
        """Names of all tensors."""
        return [name for name in self.header if name != "__metadata__"]

    def packed(self) -> bytes:
        """The file's bytes, without the hole."""
        header = json.dumps(self.header).encode()
        return struct.pack("<Q", len(header)) + header + bytes(self.data)

    def write(self, path: Path, content: bytes) -> None:
        """Write `content` and the hole to a file."""
        with path.open("wb") as file:
            file.write(content)
            if self.hollow:
                file.truncate(len(content) + self.hollow)


#: Returns the bytes of the mutated file, except for the hole.
Mutation = Callable[[Parts, random.Random], bytes]


def truncated(parts: Parts, rng: random.Random) -> bytes:
    content = parts.packed()
    parts.hollow = 0
    return content[: rng.choice([rng.randrange(len(content)), len(content) - rng.randint(1, 64)])]


def trailing_bytes(parts: Parts, rng: random.Random) -> bytes:
    parts.hollow += rng.randint(1, 4096)
    return parts.packed()


def header_length(parts: Parts, rng: random.Random) -> bytes:
    content = parts.packed()
    length = int.from_bytes(content[:8], "little")
    other = rng.choice([0, 1, length - 1, length + 1, length + 8, 2**31, 2**63, 2**64 - 1, rng.randrange(2 * length)])
    return struct.pack("<Q", other if other != length else length + 2) + content[8:]


def missing_tensor(parts: Parts, rng: random.Random) -> bytes:
    """Remove a tensor's entry, or also its data, as if another tool had saved the file without it."""
    name = rng.choice(parts.names)
    begin, end = parts.header.pop(name)["data_offsets"]
    if rng.random() < 0.5 and not parts.hollow:
        del parts.data[begin:end]
        for other in parts.names:
            entry = parts.header[other]
            if entry["data_offsets"][0] >= end:
                entry["data_offsets"] = [offset - (end - begin) for offset in entry["data_offsets"]]
    return parts.packed()


def renamed_tensor(parts: Parts, rng: random.Random) -> bytes:
    name = rng.choice(parts.names)
    other = rng.choice([name + "_", name[:-1], name.upper(), "", "x" * 5000, name.replace(".", "/"), "\u5f20\u91cf"])
    parts.header[other if other != name else name + "."] = parts.header.pop(name)
    return parts.packed()


def swapped_tensors(parts: Parts, rng: random.Random) -> bytes:
    """Swap the names of two tensors with different shapes."""
    names = parts.names
    one = rng.choice(names)
    shape = parts.header[one]["shape"]
    two = rng.choice([name for name in names if parts.header[name]["shape"] != shape])
    parts.header[one], parts.header[two] = parts.header[two], parts.header[one]
    return parts.packed()


def wrong_shape(parts: Parts, rng: random.Random) -> bytes:
    """Change a tensor's shape, to plausible or absurd ones."""
    entry = parts.header[rng.choice([name for name in parts.names if parts.header[name]["shape"]])]
    shape: list[Any] = list(entry["shape"])
    ways = [
        [*shape, 1],
        [1, *shape],
        [-shape[0], *shape[1:]],
        [2**62, *shape[1:]],
        [0, *shape[1:]],
        [shape[0] + 1, *shape[1:]],
        [str(shape[0]), *shape[1:]],
        [shape[0] + 0.5, *shape[1:]],
        [None, *shape[1:]],
        [],
        [1] * 500,
    ]
    if shape != shape[::-1]:
        ways.append(shape[::-1])
    entry["shape"] = rng.choice(ways)
    return parts.packed()


def wrong_dtype(parts: Parts, rng: random.Random) -> bytes:
    """Change a tensor's dtype to one of another size, an unknown one, or none."""
    entry = parts.header[rng.choice(parts.names)]
    size = _SIZES[entry["dtype"]]
    others: list[Any] = [dtype for dtype, bytes_ in _SIZES.items() if bytes_ != size]
    entry["dtype"] = rng.choice([*others, "F12", "", None, 16, ["F16"]])
    return parts.packed()


def wrong_offsets(parts: Parts, rng: random.Random) -> bytes:
    entry = parts.header[rng.choice(parts.names)]
    begin, end = entry["data_offsets"]
    ways = [
        [begin + 2, end + 2], [end, begin], [-begin - 2, end], [begin, end - 1], [begin, end + 2**40], [0, 0],
        [begin, 2**64], [begin], [], None, [str(begin), str(end)], [0, end - begin] if begin else [2, end - begin + 2],
    ]  # fmt: skip
    entry["data_offsets"] = rng.choice([way for way in ways if way != [begin, end]])
    return parts.packed()


def duplicate_tensor(parts: Parts, rng: random.Random) -> bytes:
    """Repeat a tensor in the header; JSON parsers silently keep only the last one."""
    name = rng.choice(parts.names)
    header = json.dumps(parts.header)[:-1] + f", {json.dumps(name)}: {json.dumps(parts.header[name])}}}"
    return struct.pack("<Q", len(header)) + header.encode() + bytes(parts.data)


def invalid_json(parts: Parts, rng: random.Random) -> bytes:
    header = rng.choice([
        b"{" * 100_000, b'{"a":' * 2000 + b"1" + b"}" * 2000, b"{}", b"[]", b"null", b'{"a": 1}', b'{"a": {}}',
        b"{\xff\xfe}", b'{"__metadata__": 7}', b'{"a": {"dtype": "F16", "shape": 3, "data_offsets": [0, 6]}}',
        json.dumps(parts.header).encode()[:-1], json.dumps(parts.header).encode() + b"}", b"{" + b" " * 10_000,
        b'{"a": NaN}', b'{"a": 1e999}',
    ])  # fmt: skip
    return struct.pack("<Q", len(header)) + header + bytes(parts.data)


def wrong_metadata(parts: Parts, rng: random.Random) -> bytes:
    """Set invalid sizes in the metadata, or values that are not strings."""
    metadata: Any = dict(parts.header.get("__metadata__", {}))
    key = rng.choice(["exvideo.num_head_channels", "exvideo.clip_num_attention_heads"])
    metadata[key] = rng.choice(["", "abc", "0", "-8", "7", "1e3", str(10**30), "3.5", 64, None, ["8"]])
    parts.header["__metadata__"] = metadata
    return parts.packed()


def nan_or_infinity(parts: Parts, rng: random.Random) -> bytes:
    """Put NaN or infinity into a tensor."""
    name = rng.choice([name for name in parts.names if parts.header[name]["dtype"] in _NON_FINITE])
    entry = parts.header[name]
    width = _SIZES[entry["dtype"]]
    begin, end = entry["data_offsets"]
    offset = begin + width * rng.randrange((end - begin) // width)
    parts.data[offset : offset + width] = rng.choice(_NON_FINITE[entry["dtype"]])
    return parts.packed()


_NON_FINITE = {
    "F16": [b"\x00\x7c", b"\x00\xfc", b"\x01\x7e"],
    "BF16": [b"\x80\x7f", b"\x80\xff", b"\xc0\x7f"],
    "F32": [b"\x00\x00\x80\x7f", b"\x00\x00\x80\xff", b"\x00\x00\xc0\x7f"],
}


def other_file_type(parts: Parts, rng: random.Random) -> bytes:
    """Replace the file by another type, such as the result of a failed download."""
    parts.hollow = 0
    return rng.choice([
        b"", b"\x00" * rng.randint(1, 4096), rng.randbytes(rng.randint(1, 4096)), b"PK\x03\x04" + rng.randbytes(200),
        b"\x80\x02}q\x00.", b"<!DOCTYPE html><html>", b"GGUF" + rng.randbytes(100), b'{"error": "not found"}',
        b"version https://git-lfs.github.com/spec/v1\n", b"\x89PNG\r\n\x1a\n" + rng.randbytes(100),
    ])  # fmt: skip


def flipped_bits_in_header(parts: Parts, rng: random.Random) -> bytes:
    content = bytearray(parts.packed())
    return _flipped(content, 0, 8 + int.from_bytes(content[:8], "little"), rng)


def flipped_bits_in_data(parts: Parts, rng: random.Random) -> bytes:
    content = bytearray(parts.packed())
    return _flipped(content, 8 + int.from_bytes(content[:8], "little"), len(content), rng)


def overwritten(parts: Parts, rng: random.Random) -> bytes:
    """Overwrite a range with zeros, noise, or another range of the file."""
    content = bytearray(parts.packed())
    begin, length = rng.randrange(len(content)), rng.choice([1, 8, 512, 4096, 65536])
    length = min(length, len(content) - begin)
    source = rng.randrange(len(content) - length + 1)
    content[begin : begin + length] = rng.choice(
        [bytes(length), rng.randbytes(length), content[source : source + length]]
    )
    return bytes(content)


def _flipped(content: bytearray, begin: int, end: int, rng: random.Random) -> bytes:
    for _ in range(rng.choice([1, 1, 2, 8, 64])):
        content[rng.randrange(begin, end)] ^= 1 << rng.randrange(8)
    return bytes(content)


#: Mutations after which a file is invalid, so that loading it would be a bug.
CORRUPTING: tuple[Mutation, ...] = (
    truncated, trailing_bytes, header_length, missing_tensor, renamed_tensor, swapped_tensors, wrong_shape, wrong_dtype,
    wrong_offsets, duplicate_tensor, invalid_json, other_file_type,
)  # fmt: skip
#: Further ones that apply only to extensions or to checkpoints.
CORRUPTING_EXTENSIONS: tuple[Mutation, ...] = (nan_or_infinity,)
CORRUPTING_CHECKPOINTS: tuple[Mutation, ...] = (wrong_metadata,)
#: Mutations after which a file can still be valid, with different weights.
ALTERING: tuple[Mutation, ...] = (flipped_bits_in_header, flipped_bits_in_data, overwritten)
