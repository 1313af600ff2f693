"""Servers on simulated cards, one for each way in which ComfyUI manages memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import other_models
import workflow_inputs
from runner.hosts import Host
from runner.server import Server
from runner.simulated_card.launch import Simulation
from small_model import recipe

#: What the host keeps free beside models, in GiB: a card with little more holds a part of a model.
_KEPT_FREE = 0.8 + 400 / 1024
_MIB = 1 / 1024
LORA = "random.safetensors"


@dataclass(frozen=True)
class Mode:
    """How a server manages the memory of its cards."""

    simulation: Simulation
    arguments: tuple[str, ...] = ()


MODES = {
    "static": Mode(Simulation(cards=2)),
    "dynamic": Mode(Simulation(cards=2, dynamic=True), ("--preview-method", "latent2rgb")),
    # 6 MiB for weights and all that is computed, in small pages: a part of the weights is refused.
    "pressure": Mode(Simulation(vram=1, dynamic=True, headroom=1 - 6 * _MIB, page=1 / 16)),
    "lowvram": Mode(Simulation(vram=_KEPT_FREE + 6 * _MIB), ("--lowvram",)),
    "novram": Mode(Simulation(), ("--novram",)),
}


#: The encoder makes another file each time: all servers get the first.
_CLIP: list[bytes] = []


def make(host: Path, arguments: Sequence[str] = (), simulation: Simulation | None = None) -> Server:
    """A server that has not started yet, with all that the saved workflows read and a LoRA."""
    server = Server(Host(host), arguments=arguments, simulation=simulation)
    workflow_inputs.give(server)
    clip = server.input / "clip.mp4"
    _CLIP.append(clip.read_bytes())
    clip.write_bytes(_CLIP[0])
    (server.models / "loras").mkdir()
    other_models.give_text_pack(server)
    for workflow in other_models.TEXT_WIDTHS:
        other_models.give(server, workflow, vae=False)
    save_file(_lora(), server.models / "loras" / LORA)
    return server


def _lora() -> dict[str, torch.Tensor]:
    """Of rank 4, on every attention's output and every convolution of the first width; strong enough to be seen."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name, weight in load_file(recipe.CHECKPOINT).items():
        layer = name.removeprefix("model.").removesuffix(".weight")
        if not name.startswith("model.diffusion_model.") or not name.endswith(
            ("to_out.0.weight", "in_layers.2.weight")
        ):
            continue
        rows, columns = weight.shape[0], weight[0].numel()
        up = torch.randn(rows, 4, generator=generator) * 0.18
        down = torch.randn(4, columns, generator=generator) * 0.18
        picture = (1,) * (weight.dim() - 2)
        found[f"{layer}.lora_up.weight"] = up.view(rows, 4, *picture).half()
        found[f"{layer}.lora_down.weight"] = down.view(4, *weight.shape[1:]).half()
    return found
