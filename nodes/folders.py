"""Model folders: the user's, and the one with the small model included with the pack."""

from __future__ import annotations

import os

import folder_paths

KEY = "exvideo"
_SHIPPED = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "small_model")
_SHIPPED_CHECKPOINT = "exvideo_small.safetensors"


def register_model_folder() -> None:
    """Register `models/exvideo` for safetensors files, in addition to the user's configured paths.

    The folder of the included extension comes last, so that the user's own files take precedence.
    """
    folder_paths.add_model_folder_path(KEY, os.path.join(folder_paths.models_dir, KEY))
    folder_paths.add_model_folder_path(KEY, os.path.join(_SHIPPED, KEY))
    paths, _ = folder_paths.folder_names_and_paths[KEY]
    folder_paths.folder_names_and_paths[KEY] = (paths, {".safetensors"})


def checkpoint_names() -> list[str]:
    """The user's checkpoints and the included one, which ComfyUI's own lists omit: only our loader can read it."""
    names = folder_paths.get_filename_list("checkpoints")
    return names if _SHIPPED_CHECKPOINT in names else [*names, _SHIPPED_CHECKPOINT]


def fingerprint(path: str | None) -> tuple[int, int] | None:
    """Changes when the file at a path does, so that ComfyUI loads it again."""
    if path is None or not os.path.isfile(path):
        return None
    found = os.stat(path)
    return found.st_mtime_ns, found.st_size


def checkpoint_path(name: str) -> str:
    """Full path of a checkpoint of `checkpoint_names`.

    Raises:
        FileNotFoundError: the file does not exist.
    """
    return find_checkpoint(name) or folder_paths.get_full_path_or_raise("checkpoints", name)


def find_checkpoint(name: str) -> str | None:
    """Full path of a checkpoint, or None if it does not exist."""
    path = folder_paths.get_full_path("checkpoints", name)
    if path is None and name == _SHIPPED_CHECKPOINT:
        return os.path.join(_SHIPPED, "checkpoints", name)
    return path
