"""Sets up ComfyUI in this process as its main.py does, without a server.

Import this module before torch, as ComfyUI's memory libraries require. It adds the ComfyUI in EXVIDEO_HOST and the
tests' helpers to the path.
"""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path

PACK = Path(__file__).resolve().parents[1]
HOST = Path(os.environ["EXVIDEO_HOST"])
sys.path[:0] = [str(HOST), str(PACK / "tests")]


def set_up(dynamic: bool = False, on_cpu: bool = False) -> None:
    """Start ComfyUI's model management.

    Args:
        dynamic: use dynamic VRAM, the default on NVIDIA cards, instead of loading whole layers by estimate.
        on_cpu: use only the CPU.

    Raises:
        RuntimeError: dynamic VRAM cannot start.
    """
    import comfy.options

    comfy.options.enable_args_parsing(False)
    import comfy.cli_args

    comfy.cli_args.args.disable_dynamic_vram = not dynamic
    comfy.cli_args.args.cpu = on_cpu
    if "torch" not in sys.modules:
        import cuda_malloc  # noqa: F401 - chooses PyTorch's allocator
    if dynamic:
        import comfy_aimdo.control

        comfy_aimdo.control.init()
    import comfy.model_management

    if dynamic:
        import comfy.memory_management
        import comfy.model_patcher

        devices = comfy.model_management.get_all_torch_devices()
        if not comfy_aimdo.control.init_devices((device.index, 0) for device in devices):
            raise RuntimeError("comfy-aimdo has found no supported card.")
        comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcherDynamic
        comfy.memory_management.aimdo_enabled = True


def end_of_node(out_of_memory: bool = False) -> None:
    """Do what ComfyUI does after each node.

    Args:
        out_of_memory: whether the node ran out of memory.
    """
    import comfy.memory_management
    import comfy.model_management

    if out_of_memory:
        comfy.model_management.unload_all_models()
        gc.collect()
        comfy.model_management.soft_empty_cache()
    if comfy.memory_management.aimdo_enabled:
        import comfy.model_prefetch
        import comfy_aimdo.model_vbar

        comfy.model_management.reset_cast_buffers()
        comfy.model_prefetch.cleanup_prefetch_queues()
        comfy_aimdo.model_vbar.vbars_reset_watermark_limits()


def weights_loaded() -> dict[str, tuple[int, int]]:
    """Bytes on the card and total bytes of each loaded model, by class name."""
    import comfy.model_management

    patchers = [loaded.model for loaded in comfy.model_management.current_loaded_models]
    return {type(p.model).__name__: (p.loaded_size(), p.model_size()) for p in patchers if p is not None}
