"""Files that appear whole or not at all, and what is said where the disk refuses them."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from exvideo_core.files.output_file import OutputFileError, begin, discard, explain_errors, finish
from exvideo_core.method import tensor_names
from exvideo_core.method.extension import Extension


@pytest.fixture(scope="module")
def extension() -> Extension:
    shapes = tensor_names.extension_shapes([32] * 16, 8, 4)
    return Extension.from_tensors("test", {name: torch.zeros(shape) for name, shape in shapes.items()})


@pytest.mark.parametrize(
    ("number", "told"),
    [
        (errno.ENOSPC, "the disk is full. Free up some space"),
        (errno.EDQUOT, "the disk is full. Free up some space"),
        (errno.EROFS, "permission to write to its folder is denied. Give the user that runs ComfyUI write access"),
        (errno.EACCES, "permission to write to its folder is denied. Give the user that runs ComfyUI write access"),
        (errno.EISDIR, "a folder has this name, or a file has its folder's name. Choose another filename_prefix"),
        (errno.ENAMETOOLONG, "its name is too long. Choose a shorter filename_prefix"),
        (errno.EIO, "the disk reported an error. Check the disk"),
    ],
)
def test_a_disks_refusals_say_what_to_do(number: int, told: str) -> None:
    with pytest.raises(OutputFileError) as error, explain_errors("/out/clip.mp4"):
        raise OSError(number, os.strerror(number))
    assert str(error.value).startswith(f"'/out/clip.mp4' cannot be written: {told}")


@pytest.mark.parametrize("other", [OSError(errno.ECHILD, "no child"), ValueError("odd"), OSError("a text only")])
def test_other_errors_stay_what_they_are(other: Exception) -> None:
    with pytest.raises(type(other)) as error, explain_errors("/out/clip.mp4"):
        raise other
    assert error.value is other


def test_a_finished_part_takes_the_place_of_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "new" / "clip.mp4"
    part = begin(path)
    part.write_bytes(b"first")
    assert not path.exists()
    finish(part, path)
    part = begin(path)
    part.write_bytes(b"second")
    assert path.read_bytes() == b"first"
    finish(part, path)
    discard(part)
    assert path.read_bytes() == b"second" and list(path.parent.iterdir()) == [path]


def test_what_is_in_the_way_is_told_before_anything_is_written(tmp_path: Path, extension: Extension) -> None:
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "folder.safetensors", tmp_path / "file" / "new.safetensors"):
        with pytest.raises(OutputFileError, match=f"'{path}' cannot be written: a folder has this name, or a file"):
            extension.save(path)
    with pytest.raises(OutputFileError, match="its name is too long"):
        extension.save(tmp_path / f"{'n' * 300}.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.safetensors"]


@pytest.mark.parametrize(
    "text",
    [
        "Error while serializing: I/O error: No space left on device (os error 28)",
        'Error while serializing: IoError(Os { code: 28, kind: StorageFull, message: "No space left on device" })',
    ],
)
@pytest.mark.skipif(os.name == "nt", reason="the number is Linux' own")
def test_the_librarys_texts_are_understood(tmp_path: Path, extension: Extension, monkeypatch, text: str) -> None:
    """Of safetensors 0.8 and 0.4: it raises no OSError."""

    def save_file(tensors: object, path: Path, **named: object) -> None:
        path.write_bytes(b"half of it")
        raise SafetensorError(text)

    monkeypatch.setattr("safetensors.torch.save_file", save_file)
    path = tmp_path / "new.safetensors"
    path.write_bytes(b"of an earlier run")
    with pytest.raises(OutputFileError, match="new.safetensors' cannot be written: the disk is full"):
        extension.save(path)
    assert list(tmp_path.iterdir()) == [path] and path.read_bytes() == b"of an earlier run"


def test_an_extension_that_the_system_does_not_take_leaves_no_part(tmp_path: Path, extension: Extension) -> None:
    resource = pytest.importorskip("resource")
    _, most = limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, most))
        with pytest.raises(OutputFileError, match="new.safetensors' cannot be written: the file is too large"):
            extension.save(tmp_path / "new.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_held_open_elsewhere_is_told(tmp_path: Path, extension: Extension, monkeypatch) -> None:
    """As Windows does it: the new file cannot take the old one's place."""

    def replace(*paths: object) -> None:
        raise PermissionError(errno.EACCES, "Access is denied")

    path = tmp_path / "new.safetensors"
    extension.save(path)
    monkeypatch.setattr("os.replace", replace)
    with pytest.raises(OutputFileError, match="new.safetensors' .* open in another program"):
        extension.save(path)
    assert list(tmp_path.iterdir()) == [path]
