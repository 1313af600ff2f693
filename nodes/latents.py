"""Nodes between the sampler and the picture."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from comfy_api.v0_0_2 import io

from ..exvideo_core.choices import BLENDS, Blend
from .checks import check_chunks, checked, refuse

if TYPE_CHECKING:
    from comfy.sd import VAE


class ExVideoNormalizeLatent(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ExVideoNormalizeLatent",
            display_name="ExVideo Normalize Latent",
            category="ExVideo",
            description="Gives every frame of a sampled clip the same brightness and contrast, as the ExVideo "
            "reference does before it decodes.",
            inputs=[
                io.Latent.Input("latent", tooltip="The sampled clip."),
                io.Boolean.Input(
                    "normalize",
                    default=True,
                    tooltip="Standardise each frame's latent to the mean and deviation of the whole clip.",
                ),
                io.Float.Input(
                    "contrast",
                    default=1.2,
                    min=0.0,
                    max=10.0,
                    step=0.05,
                    tooltip="Factor on the latent. 1.2 is the reference's, 1 leaves it.",
                ),
            ],
            outputs=[io.Latent.Output(display_name="latent", tooltip="The clip, for ExVideo Decode.")],
        )

    @classmethod
    @checked
    def execute(cls, latent: dict[str, Any], normalize: bool, contrast: float) -> io.NodeOutput:
        from ..exvideo_core.video.latents import check_latents, normalize_latents

        check_latents(latent["samples"])
        return io.NodeOutput({**latent, "samples": normalize_latents(latent["samples"], normalize, contrast)})


def decoder_inputs() -> list[io.Input]:
    """Inputs of the nodes that decode: VAE, latent, and how it is cut along time."""
    return [
        io.Vae.Input("vae", tooltip="The VAE of the SVD checkpoint."),
        io.Latent.Input("latent", tooltip="The clip to decode."),
        io.Int.Input(
            "chunk_frames",
            default=24,
            min=1,
            max=1024,
            tooltip="Frames decoded at once. More need more memory and see more of their neighbours.",
        ),
        io.Int.Input(
            "overlap_frames",
            default=12,
            min=0,
            max=1023,
            tooltip="Frames that neighbouring chunks share and blend. Has to be smaller than chunk_frames.",
        ),
    ]


def blend_input() -> io.Input:
    """Last input of the nodes that decode."""
    return io.Combo.Input(
        "blend",
        options=list(BLENDS),
        default="smooth",
        optional=True,
        tooltip="smooth: the outer third of an overlap is left out, and the rest fades, so that no seam shows. linear: "
        "the reference's, with 8 frames and an overlap of 4.",
    )


class ExVideoDecode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ExVideoDecode",
            display_name="ExVideo Decode",
            category="ExVideo",
            description="Decodes a clip in overlapping chunks of frames and blends them, so that no seam shows between "
            "chunks and memory does not grow with them.",
            inputs=[*decoder_inputs(), blend_input()],
            outputs=[io.Image.Output(display_name="image", tooltip="The frames of the clip.")],
        )

    @classmethod
    def validate_inputs(cls, chunk_frames: int | None = None, overlap_frames: int | None = None) -> bool | str:
        return check_chunks(chunk_frames, overlap_frames) or True

    @classmethod
    @checked
    def execute(
        cls, vae: VAE, latent: dict[str, Any], chunk_frames: int, overlap_frames: int, blend: Blend = "smooth"
    ) -> io.NodeOutput:
        from ..exvideo_core.comfyui.vae.decode import decode

        refuse(check_chunks(chunk_frames, overlap_frames))
        return io.NodeOutput(decode(vae, latent["samples"], chunk_frames, overlap_frames, blend))
