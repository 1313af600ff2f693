"""What other nodes do to a model or a sampling: the table of `test_composition`, one line for each.

To add a node of the host, add a line: `patch` names its file in `comfy_extras`, its class and its inputs. Whatever is
not a node takes a function of the model or of the sampler's arguments.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import comfy.hooks
import comfy.sample
import comfy.sd
import pytest
import torch

FRAMES, SIZE, STEPS = 4, 8, 2
Model = Any


def unchanged(model: Model) -> Model:
    return model


@dataclass(frozen=True)
class Case:
    """One thing that users put beside an extension.

    Attributes:
        apply: gives the changed model.
        sampling: other arguments of `sample`.
        factor: how many times larger or smaller the effect on an extended model may be than on the base.
    """

    name: str
    apply: Callable[[Model], Model] = unchanged
    sampling: dict[str, Any] = field(default_factory=dict)
    factor: float = 3.0


def node(file: str, name: str) -> Any:
    """A node's class; the test is skipped on hosts that have none of this name."""
    if importlib.util.find_spec(f"comfy_extras.{file}") is None:
        pytest.skip(f"this ComfyUI has no {file}")
    found = getattr(importlib.import_module(f"comfy_extras.{file}"), name, None)
    if found is None:
        pytest.skip(f"this ComfyUI has no {name}")
    return found


def run_node(file: str, name: str, **inputs: Any) -> Any:
    """A node's first output, whichever API it is written for."""
    found = node(file, name)
    function = found.execute if hasattr(found, "execute") else getattr(found(), found.FUNCTION)
    return function(**inputs)[0]


def patch(file: str, name: str, **inputs: Any) -> Callable[[Model], Model]:
    return lambda model: run_node(file, name, model=model, **inputs)


def conditioning(size: int = SIZE) -> tuple[list, list]:
    """Positive and negative, as the SVD conditioning nodes make them."""
    generator = torch.Generator().manual_seed(5)
    embedding = torch.randn(1, 1, 64, generator=generator)
    picture = torch.randn(1, 4, size, size, generator=generator)
    micro = {"motion_bucket_id": 127, "fps": 30, "augmentation_level": 0.02}
    negative = {**micro, "concat_latent_image": torch.zeros_like(picture)}
    return [[embedding, {**micro, "concat_latent_image": picture}]], [[torch.zeros_like(embedding), negative]]


def noise_of(frames: int = FRAMES, size: int = SIZE) -> torch.Tensor:
    return torch.randn(frames, 4, size, size, generator=torch.Generator().manual_seed(7))


def sample(
    model: Model,
    *,
    steps: int = STEPS,
    cfg: float = 3.0,
    sampler: str = "euler",
    scheduler: str = "karras",
    noise: torch.Tensor | None = None,
    latent: torch.Tensor | None = None,
    conds: Callable[[list, list], tuple[list, list]] | None = None,
    seed: int = 1,
    **named: Any,
) -> torch.Tensor:
    """The host's KSampler on a small clip. conds: changes positive and negative."""
    noise = noise_of() if noise is None else noise
    positive, negative = conditioning(noise.shape[-1])
    if conds is not None:
        positive, negative = conds(positive, negative)
    latent = torch.zeros_like(noise) if latent is None else latent
    torch.manual_seed(3)  # nodes that draw numbers of their own
    return comfy.sample.sample(
        model, noise, steps, cfg, sampler, scheduler, positive, negative, latent, seed=seed, disable_pbar=True, **named
    )


#: One layer of every kind that the low-memory layers compute from weights.
LORA_LAYERS = (
    "input_blocks.1.1.transformer_blocks.0.attn1.to_q", "input_blocks.1.1.time_stack.0.attn1.to_v",
    "input_blocks.2.0.emb_layers.1", "input_blocks.2.0.in_layers.2", "input_blocks.2.0.time_stack.in_layers.2",
    "input_blocks.3.0.op", "input_blocks.4.1.proj_in", "input_blocks.4.1.transformer_blocks.0.ff.net.0.proj",
    "input_blocks.4.1.time_pos_embed.0", "middle_block.1.transformer_blocks.0.attn2.to_v",
    "middle_block.1.proj_out", "output_blocks.3.0.skip_connection", "output_blocks.5.1.time_stack.0.ff.net.2",
    "output_blocks.5.1.time_stack.0.ff_in.net.0.proj", "output_blocks.5.2.conv",
)  # fmt: skip


def lora(model: Model, layers: tuple[str, ...] = LORA_LAYERS) -> dict[str, torch.Tensor]:
    """A LoRA file's tensors for some layers of the UNet."""
    generator, state = torch.Generator().manual_seed(9), model.model.state_dict()
    tensors = {}
    for layer in layers:
        shape = state[f"diffusion_model.{layer}.weight"].shape
        up = (shape[0], 4, *[1] * (len(shape) - 2))
        tensors[f"diffusion_model.{layer}.lora_up.weight"] = torch.randn(up, generator=generator) * 0.3
        tensors[f"diffusion_model.{layer}.lora_down.weight"] = torch.randn(4, *shape[1:], generator=generator) * 0.1
    return tensors


def with_lora(model: Model) -> Model:
    return comfy.sd.load_lora_for_models(model, None, lora(model), 1.0, 0.0)[0]


def with_bypass_lora(model: Model) -> Model:
    if not hasattr(comfy.sd, "load_bypass_lora_for_models"):
        pytest.skip("this ComfyUI has no bypass LoRAs")
    return comfy.sd.load_bypass_lora_for_models(model, None, lora(model), 1.0, 0.0)[0]


def hook_lora(layers: dict[str, torch.Tensor]) -> Callable[[list, list], tuple[list, list]]:
    """A LoRA on the conditions, whose strength falls from 1 to 0 on the way."""
    hooks = comfy.hooks.create_hook_lora(layers, 1.0, 0.0)
    keyframes = comfy.hooks.HookKeyframeGroup()
    for strength, start in ((1.0, 0.0), (0.0, 0.5)):
        keyframes.add(comfy.hooks.HookKeyframe(strength=strength, start_percent=start))
    hooks.set_keyframes_on_hooks(keyframes)

    def hooked(positive: list, negative: list) -> tuple[list, list]:
        given = comfy.hooks.set_hooks_for_conditioning(positive, hooks)
        return given, comfy.hooks.set_hooks_for_conditioning(negative, hooks)

    return hooked


def scaled_layers(model: Model) -> Model:
    """Layers of another class, as ComfyUI-GGUF and scaled fp8 have: more than their weights say."""

    def change(layer: torch.nn.Module) -> Callable[[], None]:
        original = type(layer)
        layer.__class__ = type("Scaled", (original,), {"forward_comfy_cast_weights": _scaled})
        before, layer.comfy_cast_weights = layer.comfy_cast_weights, True

        def restore() -> None:
            layer.__class__, layer.comfy_cast_weights = original, before

        return restore

    return _while_loaded(model, LORA_LAYERS, change)


def _scaled(self: torch.nn.Module, *given: Any) -> torch.Tensor:
    return 1.2 * super(type(self), self).forward_comfy_cast_weights(*given)


def replaced_forward(model: Model) -> Model:
    """Blocks and layers whose `forward` somebody has replaced."""
    paths = ("input_blocks.1.1.transformer_blocks.0", "input_blocks.4.1.time_stack.0.attn1",
             "output_blocks.5.1.transformer_blocks.0.ff", "middle_block.1.time_stack.0.attn2",
             "output_blocks.3.0.time_stack", "input_blocks.4.0.time_stack.out_layers.0")  # fmt: skip

    def change(module: torch.nn.Module) -> Callable[[], None]:
        original = module.forward
        module.forward = lambda *given, **named: 1.5 * original(*given, **named)
        return lambda: setattr(module, "forward", original)

    return _while_loaded(model, paths, change)


def forward_hooks(model: Model) -> Model:
    """PyTorch's own hooks."""

    def change(module: torch.nn.Module) -> Callable[[], None]:
        return module.register_forward_hook(lambda module, given, out: 1.2 * out).remove

    return _while_loaded(model, LORA_LAYERS, change)


def _while_loaded(
    model: Model, paths: tuple[str, ...], change: Callable[[torch.nn.Module], Callable[[], None]]
) -> Model:
    """A clone whose modules are changed for as long as it is loaded. change: returns what takes it back."""
    from comfy.patcher_extension import PatcherInjection

    restores: list[Callable[[], None]] = []

    def inject(patcher: Model) -> None:
        unet = patcher.model.diffusion_model
        restores.extend([change(unet.get_submodule(path)) for path in paths])

    def eject(patcher: Model) -> None:
        while restores:
            restores.pop()()

    changed = model.clone()
    changed.set_injections("test", [PatcherInjection(inject, eject)])
    return changed


def custom_patch(setter: str, function: Callable[..., Any]) -> Callable[[Model], Model]:
    def apply(model: Model) -> Model:
        changed = model.clone()
        getattr(changed, setter)(function)
        return changed

    return apply


def replaced_attention(model: Model) -> Model:
    changed = model.clone()
    changed.set_model_attn1_replace(lambda q, k, v, options: v, "input", 1)
    return changed


def attention_override(model: Model) -> Model:
    changed = model.clone()
    changed.model_options["transformer_options"]["optimized_attention_override"] = (
        lambda function, q, k, v, *given, **named: 0.5 * function(q, k, v, *given, **named)
    )
    return changed


def mixed_frames(out: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
    """A patch that looks at all of a batch at once."""
    return out + out.mean(0, keepdim=True)


def _shared_area(positive: list, negative: list) -> tuple[list, list]:
    other = [[positive[0][0].flip(-1), {**positive[0][1], "area": (SIZE // 2, SIZE, SIZE // 2, 0), "strength": 1.0}]]
    return positive + other, negative


def _masked(positive: list, negative: list) -> tuple[list, list]:
    mask = torch.rand(FRAMES, SIZE, SIZE, generator=torch.Generator().manual_seed(2))
    other = [[positive[0][0].flip(-1), {**positive[0][1], "mask": mask, "mask_strength": 1.0}]]
    return positive + other, negative


def _in_time(positive: list, negative: list) -> tuple[list, list]:
    first, second = {"start_percent": 0.0, "end_percent": 0.5}, {"start_percent": 0.5, "end_percent": 1.0}
    other = [[positive[0][0].flip(-1), {**positive[0][1], **second}]]
    return [[positive[0][0], {**positive[0][1], **first}], *other], negative


def _frame_mask() -> torch.Tensor:
    return torch.linspace(0, 1, FRAMES).view(-1, 1, 1, 1).expand(-1, 1, SIZE, SIZE).clone()


_GIVEN = torch.randn(FRAMES, 4, SIZE, SIZE, generator=torch.Generator().manual_seed(4))
_DOWNSCALE = {
    "block_number": 3, "downscale_factor": 2.0, "start_percent": 0.0, "end_percent": 1.0,
    "downscale_after_skip": True, "downscale_method": "bicubic", "upscale_method": "bicubic",
}  # fmt: skip
_EASY = {"reuse_threshold": 0.5, "start_percent": 0.0, "end_percent": 1.0, "verbose": False}

CASES = [
    Case("NAGuidance", patch("nodes_nag", "NAGuidance", nag_scale=5.0, nag_alpha=0.5, nag_tau=1.5)),
    Case("PerturbedAttentionGuidance", patch("nodes_pag", "PerturbedAttentionGuidance", scale=3.0)),
    Case("HyperTile", patch("nodes_hypertile", "HyperTile", tile_size=32, swap_size=1, max_depth=0, scale_depth=False),
         {"noise": noise_of(size=16)}),
    Case("TomePatchModel", patch("nodes_tomesd", "TomePatchModel", ratio=0.5)),
    Case("FreeU", patch("nodes_freelunch", "FreeU", b1=1.1, b2=1.2, s1=0.9, s2=0.2),
         {"noise": noise_of(size=32)}),
    Case("FreeU_V2", patch("nodes_freelunch", "FreeU_V2", b1=1.3, b2=1.4, s1=0.9, s2=0.2),
         {"noise": noise_of(size=32)}),
    Case("PatchModelAddDownscale", patch("nodes_model_downscale", "PatchModelAddDownscale", **_DOWNSCALE),
         {"noise": noise_of(size=16)}),
    Case("PatchModelAddDownscale before the skip", patch("nodes_model_downscale", "PatchModelAddDownscale",
         **_DOWNSCALE | {"downscale_after_skip": False}), {"noise": noise_of(size=16)}),
    Case("RescaleCFG", patch("nodes_model_advanced", "RescaleCFG", multiplier=0.7)),
    Case("ModelSamplingContinuousEDM", patch("nodes_model_advanced", "ModelSamplingContinuousEDM",
         sampling="v_prediction", sigma_max=120.0, sigma_min=0.002)),
    Case("VideoLinearCFGGuidance", patch("nodes_video_model", "VideoLinearCFGGuidance", min_cfg=1.0)),
    Case("VideoTriangleCFGGuidance", patch("nodes_video_model", "VideoTriangleCFGGuidance", min_cfg=1.0)),
    Case("UNetSelfAttentionMultiply", patch("nodes_attention_multiply", "UNetSelfAttentionMultiply",
         q=1.2, k=0.8, v=1.1, out=0.9)),
    Case("UNetTemporalAttentionMultiply", patch("nodes_attention_multiply", "UNetTemporalAttentionMultiply",
         self_structural=1.2, self_temporal=0.7, cross_structural=1.1, cross_temporal=0.9)),
    Case("EasyCache", patch("nodes_easycache", "EasyCacheNode", **_EASY), {"steps": 8}),
    Case("LazyCache", patch("nodes_easycache", "LazyCacheNode", **_EASY), {"steps": 8}),
    Case("Epsilon Scaling", patch("nodes_eps", "EpsilonScaling", scaling_factor=1.05)),
    Case("TCFG", patch("nodes_tcfg", "TCFG")),
    Case("Mahiro", patch("nodes_mahiro", "Mahiro")),
    Case("APG", patch("nodes_apg", "APG", eta=0.5, norm_threshold=5.0, momentum=0.5)),
    Case("CFGZeroStar", patch("nodes_cfg", "CFGZeroStar")),
    Case("DifferentialDiffusion", patch("nodes_differential_diffusion", "DifferentialDiffusion", strength=1.0),
         {"noise_mask": _frame_mask(), "latent": _GIVEN}),
    Case("LoRA", with_lora),
    Case("LoRA bypassed", with_bypass_lora),
    Case("layers of another class", scaled_layers),
    Case("blocks with a replaced forward", replaced_forward),
    Case("forward hooks", forward_hooks),
    Case("attention override", attention_override),
    Case("a patch that looks across frames", custom_patch("set_model_attn1_output_patch", mixed_frames)),
    Case("a patch between self and cross attention", custom_patch("set_model_attn2_output_patch",
         lambda out, options: 2 * out)),
    Case("a replaced attention", replaced_attention),
    Case("input block patch", custom_patch("set_model_input_block_patch", lambda h, options: 1.1 * h)),
    Case("output block patch", custom_patch("set_model_output_block_patch", lambda h, skip, options: (h, 1.2 * skip))),
    Case("euler_ancestral", sampling={"sampler": "euler_ancestral", "steps": 4}),
    Case("dpmpp_2m_sde", sampling={"sampler": "dpmpp_2m_sde", "steps": 4}),
    Case("uni_pc", sampling={"sampler": "uni_pc", "steps": 4}),
    Case("lcm", sampling={"sampler": "lcm", "steps": 4}),
    Case("exponential", sampling={"scheduler": "exponential", "steps": 4}),
    Case("half denoised", sampling={"denoise": 0.5, "latent": _GIVEN}),
    Case("noise mask", sampling={"noise_mask": _frame_mask().round(), "latent": _GIVEN}),
    Case("area", sampling={"conds": _shared_area}),
    Case("masked condition", sampling={"conds": _masked}),
    Case("conditions in time", sampling={"conds": _in_time, "steps": 4}),
]  # fmt: skip
