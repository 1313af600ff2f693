"""Generates the quickstart's video without ComfyUI, with diffusers' pipeline and the same small model."""

from __future__ import annotations

import sys
import time

from .demo import next_target, probe, quickstart


def main() -> int:
    import torch

    from exvideo_core.diffusers import checkpoint, patch
    from exvideo_core.diffusers.sampling import generate_video
    from exvideo_core.method.extension import Extension
    from exvideo_core.post_tuning.videos import write_video
    from small_model import recipe, world

    started = time.monotonic()
    nodes = quickstart()
    sampling, levels, conditioning = (
        nodes[kind] for kind in ("SamplerCustom", "KarrasScheduler", "ExVideoConditioning")
    )
    clip = world.sample(nodes["ExVideoExamplePicture"]["seed"])
    svd = checkpoint.load(recipe.CHECKPOINT)
    patch.apply(svd.unet, Extension.load(recipe.EXTENSION))
    video = generate_video(
        svd,
        torch.from_numpy(world.render(clip, 1)),
        frames=conditioning["frames"],
        fps=conditioning["fps"],
        motion_bucket_id=clip.motion_bucket,
        noise_aug_strength=conditioning["noise_aug_strength"],
        steps=levels["steps"],
        guidance=(sampling["cfg"], sampling["cfg"]),
        sigmas=(levels["sigma_max"], levels["sigma_min"]),
        sampler=nodes["KSamplerSelect"]["sampler_name"],
        seed=sampling["noise_seed"],
        progress=lambda step, steps: print(f"\rsampling: {step}/{steps}   ", end="", flush=True),
    )
    print()
    size = nodes["ImageScale"]["width"]
    upscaled = torch.nn.functional.interpolate(
        torch.from_numpy(video).movedim(-1, 1).float(), size=(size, size), mode="bilinear"
    )
    target = next_target()
    write_video(target, upscaled.round().byte().movedim(1, -1).numpy(), conditioning["fps"])
    frames, width, height = probe(target)
    print(f"{target}\n{frames} frames of {width}x{height} in {time.monotonic() - started:.0f} s with diffusers.")
    return 0 if frames == conditioning["frames"] else 1


if __name__ == "__main__":
    sys.exit(main())
