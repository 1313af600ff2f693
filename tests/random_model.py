"""A small SVD checkpoint and a 128-frame extension with seeded random weights, in the real formats.

The layouts come from the host's own classes, so `make` needs an importable ComfyUI.
"""

from __future__ import annotations

from pathlib import Path

CHECKPOINT = "exvideo_small_random.safetensors"
EXTENSION = "exvideo_small_random_128f.safetensors"

HEAD_CHANNELS = 32
CLIP_HEADS = 2
CONTEXT = 64
UNET = {
    "use_checkpoint": False, "image_size": 32, "use_spatial_transformer": True, "legacy": False,
    "num_classes": "sequential", "adm_in_channels": 768, "in_channels": 8, "out_channels": 4,
    "model_channels": 32, "num_res_blocks": [2, 2, 2, 2], "channel_mult": [1, 2, 2, 2],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0], "transformer_depth_middle": 1,
    "use_linear_in_transformer": True, "context_dim": CONTEXT, "extra_ff_mix_layer": True,
    "use_spatial_context": True, "merge_strategy": "learned_with_images", "merge_factor": 0.0,
    "video_kernel_size": [3, 1, 1], "use_temporal_resblock": True, "use_temporal_attention": True,
    "disable_temporal_crossattention": False, "num_heads": -1, "num_head_channels": HEAD_CHANNELS,
}  # fmt: skip
VAE = {
    "double_z": True, "z_channels": 4, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 32,
    "ch_mult": [1, 1, 2, 2], "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0,
}  # fmt: skip
CLIP = {
    "model_type": "clip_vision_model", "hidden_act": "gelu", "hidden_size": 64, "num_channels": 3,
    "patch_size": 14, "image_size": 224, "intermediate_size": 128, "num_attention_heads": CLIP_HEADS,
    "num_hidden_layers": 2, "projection_dim": CONTEXT,
}  # fmt: skip


def make(models: Path, seed: int = 0, frames: int = 128) -> tuple[Path, Path]:
    """Write the checkpoint and the extension beneath a models folder; the host has to be importable.

    Returns:
        The two paths.
    """
    import comfy.options

    comfy.options.enable_args_parsing(False)
    import comfy.cli_args

    comfy.cli_args.args.cpu = True  # nothing here computes: no device has to be woken
    import torch
    from safetensors.torch import save_file

    from exvideo_core.method import tensor_names

    generator = torch.Generator().manual_seed(seed)
    tensors = _checkpoint(generator)
    widths = [tensors[f"model.diffusion_model.{name}.norm.weight"].shape[0] for name in tensor_names.SVD_TRANSFORMERS]
    extension = random_extension(widths, CONTEXT, frames, generator)
    metadata = {
        "exvideo.num_head_channels": str(HEAD_CHANNELS),
        "exvideo.clip_num_attention_heads": str(CLIP_HEADS),
        "description": "seeded random weights, for trying graphs out",
    }
    paths = models / "checkpoints" / CHECKPOINT, models / "exvideo" / EXTENSION
    for path, content in zip(paths, (tensors, extension), strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({key: value.half() for key, value in content.items()}, path, metadata)
    return paths


def random_extension(widths, context_dim, frames, generator):  # noqa: ANN001, ANN201
    """An extension near identity, named and shaped as published, in float32."""
    import torch

    from exvideo_core.method import tensor_names

    tensors = {}
    for name, shape in tensor_names.extension_shapes(widths, context_dim, frames).items():
        tensors[name] = random_weight(name, shape, generator)
        if name.endswith(tensor_names.CONV_WEIGHT):
            tensors[name] *= 0.3
            tensors[name][:, :, 1, 1, 1] += torch.eye(shape[0])
        elif name.endswith(tensor_names.POSITIONS):
            tensors[name] = torch.randn(shape, generator=generator)
    return tensors


def random_weight(name, shape, generator):  # noqa: ANN001, ANN201
    """A random weight that keeps activations near unit size."""
    import math

    import torch

    noise = torch.randn(shape, generator=generator)
    if "norm" in name or ".ln_" in name or (len(shape) == 1 and name.endswith("weight")):
        return noise * 0.1 + (1.0 if name.endswith("weight") else 0.0)
    return noise * (0.1 if len(shape) < 2 else 1 / math.sqrt(math.prod(shape[1:])))


def _checkpoint(generator):  # noqa: ANN001, ANN202
    """A whole SVD checkpoint in float32, named as the host's loader expects it."""
    shapes = checkpoint_shapes(UNET, VAE, CLIP)
    return {name: random_weight(name, shape, generator) for name, shape in shapes.items()}


def svd_shapes() -> dict[str, tuple[int, ...]]:
    """Shapes of a checkpoint of SVD's own sizes."""
    unet = {**UNET, "model_channels": 320, "channel_mult": [1, 2, 4, 4], "context_dim": 1024, "num_head_channels": 64}
    clip = {**CLIP, "hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 16, "num_hidden_layers": 32,
            "projection_dim": 1024}  # fmt: skip
    return checkpoint_shapes(unet, {**VAE, "ch": 128, "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2}, clip)


def svd_header() -> tuple[dict[str, dict], int]:
    """The safetensors header of such a checkpoint in fp16, and how many bytes of data it asks for."""
    import math

    header, size = {}, 0
    for name, shape in svd_shapes().items():
        end = size + 2 * math.prod(shape)
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [size, end]}
        size = end
    return header, size


def checkpoint_shapes(unet_sizes: dict, vae_sizes: dict, clip_sizes: dict) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of a checkpoint: what the host's classes hold, under the file's names."""
    import comfy.clip_model
    import comfy.ldm.models.autoencoder
    import comfy.ldm.modules.diffusionmodules.openaimodel as openaimodel
    import comfy.ops
    import torch

    ops = comfy.ops.manual_cast
    with torch.device("meta"):
        unet = openaimodel.UNetModel(**unet_sizes, dtype=torch.float32, device="meta", operations=ops)
        vae = comfy.ldm.models.autoencoder.AutoencodingEngine(
            regularizer_config={"target": "comfy.ldm.models.autoencoder.DiagonalGaussianRegularizer"},
            encoder_config={"target": "comfy.ldm.modules.diffusionmodules.model.Encoder", "params": vae_sizes},
            decoder_config={
                "target": "comfy.ldm.modules.temporal_ae.VideoDecoder",
                "params": {**vae_sizes, "video_kernel_size": [3, 1, 1], "alpha": 0.0},
            },
        )
        clip = comfy.clip_model.CLIPVisionModelProjection(clip_sizes, torch.float32, "meta", ops)
    shapes = {}
    for prefix, module in (("model.diffusion_model.", unet), ("first_stage_model.", vae)):
        shapes |= {prefix + name: tuple(value.shape) for name, value in module.state_dict().items()}
    encoder = {name: tuple(value.shape) for name, value in clip.state_dict().items()}
    prefix = "conditioner.embedders.0.open_clip.model.visual."
    return shapes | {prefix + name: shape for name, shape in _open_clip(encoder).items()}


def _open_clip(shapes):  # noqa: ANN001, ANN202
    """Shapes of the image encoder under OpenCLIP's names, in which SVD checkpoints store it."""
    v = "vision_model."
    width = shapes[f"{v}embeddings.class_embedding"][0]
    renamed = {
        "class_embedding": (width,),
        "conv1.weight": shapes[f"{v}embeddings.patch_embedding.weight"],
        "positional_embedding": shapes[f"{v}embeddings.position_embedding.weight"],
        "proj": tuple(reversed(shapes["visual_projection.weight"])),
    }
    for ours, theirs in (("ln_pre", "pre_layrnorm"), ("ln_post", "post_layernorm")):
        for parameter in ("weight", "bias"):
            renamed[f"{ours}.{parameter}"] = shapes[f"{v}{theirs}.{parameter}"]
    layers = {name.split(".")[3] for name in shapes if name.startswith(f"{v}encoder.layers.")}
    for layer in range(len(layers)):
        old, new = f"{v}encoder.layers.{layer}.", f"transformer.resblocks.{layer}."
        renamed[f"{new}attn.in_proj_weight"] = (3 * width, width)
        renamed[f"{new}attn.in_proj_bias"] = (3 * width,)
        pairs = {"attn.out_proj": "self_attn.out_proj", "ln_1": "layer_norm1", "ln_2": "layer_norm2",
                 "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}  # fmt: skip
        for ours, theirs in pairs.items():
            for parameter in ("weight", "bias"):
                renamed[f"{new}{ours}.{parameter}"] = shapes[f"{old}{theirs}.{parameter}"]
    return renamed
