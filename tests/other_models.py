"""The workflows of CogVideoX and Wan on small random models. Their text encoders have only one size, 5 B parameters.

A node of a pack for tests makes conditioning from a text instead. VAEs have the published sizes.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from runner.hosts import PACK
from runner.server import Prompt, Server

FOLDER = PACK / "workflows" / "api"
#: Workflow -> width of its model's text embedding.
TEXT_WIDTHS = {"exvideo_cogvideox": 64, "exvideo_wan": 4096}
FRAMES, WIDTH, HEIGHT = 9, 96, 64
_AFTER_SAMPLING = ("VAELoader", "VAEDecodeTiled", "CreateVideo", "SaveVideo")

_PACK = '''
import hashlib
import torch

class TestConditioning:
    """Conditioning that depends on a text."""
    CATEGORY = "tests"
    FUNCTION = "make"
    RETURN_TYPES = ("CONDITIONING",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"text": ("STRING", {}), "width": ("INT", {"max": 8192})}}

    def make(self, text, width):
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")
        return ([[torch.randn(1, 226, width, generator=torch.Generator().manual_seed(seed)), {}]],)

NODE_CLASS_MAPPINGS = {"TestConditioning": TestConditioning}
'''


def model_files(graph: Prompt) -> list[tuple[str, str]]:
    """Folder and name of each model file of a workflow."""
    folders = {"ExVideoCogVideoXLoader": "diffusion_models", "UNETLoader": "diffusion_models",
               "ExVideoLoraLoader": "loras", "VAELoader": "vae", "CLIPLoader": "text_encoders"}  # fmt: skip
    found = []
    for node in graph.values():
        if node["class_type"] in folders:
            name = next(value for key, value in node["inputs"].items() if key.endswith("_name"))
            found.append((folders[node["class_type"]], name))
    return found


def load(name: str) -> Prompt:
    """A saved workflow."""
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def give_names(server: Server) -> None:
    """Put empty files with the names of the models where the workflows look for them."""
    for workflow in TEXT_WIDTHS:
        for folder, name in model_files(load(workflow)):
            (server.models / folder).mkdir(parents=True, exist_ok=True)
            (server.models / folder / name).touch()


def give_text_pack(server: Server) -> None:
    """Give a server that has not started yet the pack with `TestConditioning`."""
    folder = server.base / "custom_nodes" / "exvideo_test_conditioning"
    folder.mkdir()
    (folder / "__init__.py").write_text(_PACK, encoding="utf-8")


def give(server: Server, workflow: str, vae: bool = True) -> None:
    """Put small random models of a workflow where it looks for them. The VAE needs ComfyUI's own classes."""
    import cogvideox
    import wan

    paths = {folder: server.models / folder / name for folder, name in model_files(load(workflow))}
    for path in paths.values():
        path.parent.mkdir(parents=True, exist_ok=True)
    if workflow == "exvideo_wan":
        model, modules = wan.reference_model(), wan.block_modules()
        cogvideox.save(model.state_dict(), paths["diffusion_models"])
    else:
        model, modules = cogvideox.reference_model(), cogvideox.block_modules()
        tensors = cogvideox.diffusers_tensors(model)
        for number in (1, 2):
            name = paths["diffusion_models"].name.replace("00001-of", f"0000{number}-of")
            part = {key: value for index, (key, value) in enumerate(sorted(tensors.items())) if index % 2 == number - 1}
            cogvideox.save(part, paths["diffusion_models"].with_name(name))
    cogvideox.save(cogvideox.lora_tensors(model.state_dict(), modules), paths["loras"])
    if vae:
        _save_vae(workflow, paths["vae"])


def _save_vae(workflow: str, path: Path) -> None:
    import cogvideox

    torch.manual_seed(0)
    if workflow == "exvideo_wan":
        from comfy.ldm.wan.vae import WanVAE

        vae: torch.nn.Module = WanVAE(dim=96, z_dim=16, temperal_downsample=[False, True, True])
    else:
        from comfy.ldm.cogvideo.vae import AutoencoderKLCogVideoX

        vae = AutoencoderKLCogVideoX()
    cogvideox.randomize(vae)
    cogvideox.save({name: value.half() for name, value in vae.state_dict().items()}, path)


def small(workflow: str) -> Prompt:
    """A saved workflow of few frames, small images and two steps, with conditioning from `TestConditioning`."""
    graph = load(workflow)
    sizes = {"EmptyHunyuanLatentVideo": {"width": WIDTH, "height": HEIGHT, "length": FRAMES},
             "BasicScheduler": {"steps": 2}, "KSampler": {"steps": 2}}  # fmt: skip
    for key in [key for key, node in graph.items() if node["class_type"] == "CLIPLoader"]:
        del graph[key]
    for node in graph.values():
        node["inputs"].update(sizes.get(node["class_type"], {}))
        if node["class_type"] == "CLIPTextEncode":
            node["class_type"] = "TestConditioning"
            node["inputs"] = {"text": node["inputs"]["text"], "width": TEXT_WIDTHS[workflow]}
    return graph


def small_latent(workflow: str, strength: float = 1.0) -> Prompt:
    """The same up to the latent, which is saved."""
    graph = small(workflow)
    for key in [key for key, node in graph.items() if node["class_type"] in _AFTER_SAMPLING]:
        del graph[key]
    sampler = next(key for key, node in graph.items() if "latent_image" in node["inputs"])
    graph["save"] = {"class_type": "SaveLatent", "inputs": {"samples": [sampler, 0], "filename_prefix": "latent"}}
    loader = next(node for node in graph.values() if node["class_type"] == "ExVideoLoraLoader")
    loader["inputs"]["strength_model"] = strength
    return graph


def latent(server: Server, workflow: str, strength: float = 1.0) -> torch.Tensor:
    """Run `small_latent` [1, C, T, H, W]."""
    from safetensors.torch import load_file

    result = server.run(small_latent(workflow, strength))
    assert result.status == "success", result.error
    (entry,) = result.outputs["save"]["latents"]
    return load_file(server.output / entry["subfolder"] / entry["filename"])["latent_tensor"]
