"""Applies an extension many times in one process on a simulated card with dynamic VRAM; prints JSON of what it found.

python tests/card_applies.py COMFYUI APPLIES
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from comfy.model_patcher import ModelPatcher

    from exvideo_core.method.extension import Extension

STRENGTHS = (0.25, 0.5, 0.75, 1.0)


def extension() -> Extension:
    from exvideo_core.method.extension import Extension
    from small_model import recipe

    return Extension.load(recipe.EXTENSION)


def sampled(model: ModelPatcher, frames: int = 4, size: int = 8) -> torch.Tensor:
    """One step of a clip: latents [T, 4, H, W]; ends as a node ends in the host."""
    import comfy.model_management
    import comfy.sample
    import comfy_aimdo.model_vbar
    import torch

    generator = torch.Generator().manual_seed(0)
    latent = torch.zeros(frames, 4, size, size)
    embedding = torch.randn(1, 1, 64, generator=generator)
    picture = torch.randn(1, 4, size, size, generator=generator)
    micro = {"motion_bucket_id": 127, "fps": 30, "augmentation_level": 0.0, "concat_latent_image": picture}
    conditioning = [[embedding, micro]]
    noise = comfy.sample.prepare_noise(latent, 0)
    try:
        return comfy.sample.sample(
            model, noise, 1, 1.0, "euler", "karras", conditioning, conditioning, latent, disable_pbar=True
        )
    finally:
        comfy.model_management.reset_cast_buffers()
        comfy_aimdo.model_vbar.vbars_reset_watermark_limits()


def enable_dynamic_vram() -> None:
    """As the host's main.py does."""
    import comfy.memory_management
    import comfy.model_patcher
    import comfy_aimdo.control
    import torch

    comfy_aimdo.control.init_devices([(index, 0) for index in range(torch.cuda.device_count())])
    comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcherDynamic
    comfy.memory_management.aimdo_enabled = True


def main(host: str, applies: int) -> None:
    sys.path[:0] = [host, str(Path(__file__).resolve().parents[1])]
    from runner import simulated_card

    simulated_card.install(dynamic=True)
    found: dict[str, Any] = {"offsets": [], "pins": [], "changed": [], "error": None}
    with simulated_card.active():
        import comfy.options

        comfy.options.enable_args_parsing(False)
        import comfy.model_management
        import torch

        enable_dynamic_vram()
        from exvideo_core.comfyui.apply.patch import apply_extension
        from exvideo_core.comfyui.checkpoint.load import load_checkpoint
        from small_model import recipe

        with torch.inference_mode():
            model, loaded, results = load_checkpoint(str(recipe.CHECKPOINT))[0], extension(), {}
            for number in range(applies):
                strength = STRENGTHS[number % len(STRENGTHS)]
                try:
                    latents = sampled(apply_extension(model, loaded, strength))
                except Exception as error:
                    found["error"] = f"apply {number}: {type(error).__name__}: {error}"
                    break
                if not latents.equal(results.setdefault(strength, latents)):
                    found["changed"].append(number)
                vbars = simulated_card.dynamic_memory().vbars
                found["offsets"].append(sum(vbar.offset for vbar in vbars))
                found["pins"].append(sum(vbar.pins for vbar in vbars))
            found["distinct"] = len({tuple(latents.flatten().tolist()) for latents in results.values()})
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
