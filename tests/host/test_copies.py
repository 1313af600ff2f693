"""Patched copies of a model are gone as soon as nobody holds them: no cycle keeps them for the garbage collector."""

from __future__ import annotations

import gc
import weakref

import comfy.model_management
import comfy.sample
import pytest
import torch

from exvideo_core.comfyui.apply.patch import apply_extension
from exvideo_core.comfyui.checkpoint.load import load_checkpoint
from exvideo_core.comfyui.low_memory.chunked_unet import with_memory_settings
from exvideo_core.comfyui.low_memory.estimate import MemorySettings
from exvideo_core.comfyui.sampling.recording import record_sampling
from exvideo_core.comfyui.sampling.tiles import TileSettings, with_tiles
from exvideo_core.comfyui.sampling.windows import WindowSettings, with_windows
from exvideo_core.method.extension import Extension

#: What follows ExVideo Apply.
WAYS = {
    "nothing": lambda model: model,
    "memory": lambda model: with_memory_settings(model, MemorySettings(1, True)),
    "sequential": lambda model: with_windows(model, WindowSettings(6, 2, "sequential")),
    "pyramid": lambda model: with_windows(model, WindowSettings(6, 2, "pyramid")),
    "tiles": lambda model: with_tiles(model, TileSettings(6, 8, 2)),
    "recorded": lambda model: record_sampling(model, 2)[0],
}


@pytest.mark.parametrize("way", WAYS)
def test_a_copy_dies_with_its_last_reference(small_models, way: str) -> None:
    checkpoint, extension = small_models
    base, _, _ = load_checkpoint(str(checkpoint))
    applied = apply_extension(base, Extension.load(extension))
    copy = WAYS[way](applied)
    watched = [weakref.ref(applied), weakref.ref(copy)]
    gc.collect()
    gc.disable()
    try:
        _sample(copy)
        del applied, copy
        assert [reference() for reference in watched] == [None, None]
    finally:
        gc.enable()


def test_a_model_dies_with_its_last_patcher(small_models) -> None:
    checkpoint, extension = small_models
    base, _, _ = load_checkpoint(str(checkpoint))
    applied = with_memory_settings(apply_extension(base, Extension.load(extension)), MemorySettings(1, True))
    watched = weakref.ref(base.model)
    gc.collect()
    gc.disable()
    try:
        _sample(applied)
        _sample(base)
        del base, applied
        comfy.model_management.cleanup_models()
        assert watched() is None
    finally:
        gc.enable()


def _sample(model) -> None:
    latent = torch.zeros(8, 4, 8, 8)
    conditioning = [[torch.zeros(1, 1, 64), {"motion_bucket_id": 127, "fps": 30, "augmentation_level": 0.0,
                                             "concat_latent_image": torch.zeros(1, 4, 8, 8)}]]  # fmt: skip
    noise = comfy.sample.prepare_noise(latent, 0)
    comfy.sample.sample(model, noise, 2, 1.0, "euler", "karras", conditioning, conditioning, latent)
