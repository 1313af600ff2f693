"""The `exvideo` model folder."""

from __future__ import annotations

import os

import folder_paths

KEY = "exvideo"


def register_model_folder() -> None:
    """Register `models/exvideo` for safetensors files, beside paths that the user's configuration gave."""
    folder_paths.add_model_folder_path(KEY, os.path.join(folder_paths.models_dir, KEY))
    paths, _ = folder_paths.folder_names_and_paths[KEY]
    folder_paths.folder_names_and_paths[KEY] = (paths, {".safetensors"})
