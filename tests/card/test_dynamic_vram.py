"""Cards with more or less free memory, in this process: the same kernels, the same latents."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

import comfy.model_management
import comfy.model_patcher
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import card_applies
from exvideo_core.comfyui.apply.patch import apply_extension
from exvideo_core.comfyui.checkpoint.load import load_checkpoint
from runner import simulated_card
from runner.simulated_card import GIB
from small_model import recipe

Model = comfy.model_patcher.ModelPatcher
#: Operators whose rounding follows the sizes of what they are given.
KERNELS = ("convolution", "mm", "norm", "attention", "linear")


class Kernels(TorchDispatchMode):
    """Notes which kernels run, and on tensors of which sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        if any(kernel in name for kernel in KERNELS):
            self.found.append((name, *(tuple(arg.shape) for arg in args if isinstance(arg, torch.Tensor))))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def model() -> Iterator[Model]:
    with torch.inference_mode():
        yield load_checkpoint(str(recipe.CHECKPOINT))[0]
    comfy.model_management.unload_all_models()
    gc.collect()


@contextlib.contextmanager
def only_free(size: int) -> Iterator[None]:
    """Others hold the card but for some bytes."""
    memory = simulated_card.memory()
    taken = memory.free - size
    memory.allocate(taken)
    try:
        yield
    finally:
        memory.release(taken)


@pytest.mark.parametrize(
    ("dynamic", "frames", "size"), [(False, 8, 8), (True, 8, 8), pytest.param(True, 80, 32, marks=pytest.mark.nightly)]
)
def test_free_memory_does_not_change_the_latents(dynamic: bool, frames: int, size: int, model: Model) -> None:
    """With all of a model loaded and with none of it; and of a clip long enough to be computed in chunks.

    Kernels round differently for chunks of another size.
    """
    patched = apply_extension(model, card_applies.extension())
    if not dynamic:
        patched = patched.clone(disable_dynamic=True)
    card_applies.sampled(patched)
    latents, kernels = [], []
    for free in (1.8 * GIB, 0.6 * GIB):
        mode = Kernels()
        with only_free(int(free)), simulated_card.counting(mode):
            latents.append(card_applies.sampled(patched, frames, size))
        kernels.append(mode.found)
    assert len(kernels[0]) > 500
    assert len(kernels[0]) == len(kernels[1]) and kernels[0] == kernels[1]
    assert latents[0].equal(latents[1])
