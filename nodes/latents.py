"""Nodes between the sampler and the images."""

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
            description="Gives every frame of a sampled video the same brightness and contrast, as the ExVideo "
            "reference does before decoding.",
            inputs=[
                io.Latent.Input("latent", tooltip="The sampled latent."),
                io.Boolean.Input(
                    "normalize",
                    default=True,
                    tooltip="Normalize each frame's latent to the mean and standard deviation of the whole video.",
                ),
                io.Float.Input(
                    "contrast",
                    default=1.2,
                    min=0.0,
                    max=10.0,
                    step=0.05,
                    tooltip="Factor applied to the latent. The reference uses 1.2; 1 leaves the contrast unchanged.",
                ),
            ],
            outputs=[io.Latent.Output(display_name="latent", tooltip="The normalized latent, for ExVideo Decode.")],
        )

    @classmethod
    @checked
    def execute(cls, latent: dict[str, Any], normalize: bool, contrast: float) -> io.NodeOutput:
        from ..exvideo_core.video.latents import check_latents, normalize_latents

        check_latents(latent["samples"])
        return io.NodeOutput({**latent, "samples": normalize_latents(latent["samples"], normalize, contrast)})


def decoder_inputs() -> list[io.Input]:
    """Inputs shared by the decoding nodes: the VAE, the latent, and how it is split along time."""
    return [
        io.Vae.Input("vae", tooltip="The VAE of the SVD checkpoint."),
        io.Latent.Input("latent", tooltip="The latent to decode."),
        io.Int.Input(
            "chunk_frames",
            default=24,
            min=1,
            max=1024,
            tooltip="Number of frames decoded together, as one segment. Higher values use more memory, and each "
            "frame sees more of its neighbors.",
        ),
        io.Int.Input(
            "overlap_frames",
            default=12,
            min=0,
            max=1023,
            tooltip="Number of frames that neighboring segments share and blend. Must be smaller than chunk_frames.",
        ),
    ]


def blend_input() -> io.Input:
    """The last input of the decoding nodes."""
    return io.Combo.Input(
        "blend",
        options=list(BLENDS),
        default="smooth",
        optional=True,
        tooltip="How overlapping segments are blended. smooth: drops the outer third of the overlap and crossfades "
        "the rest, so that no seam is visible. linear: the reference's method, which it uses with 8 frames and an "
        "overlap of 4.",
    )


class ExVideoDecode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ExVideoDecode",
            display_name="ExVideo Decode",
            category="ExVideo",
            description="Decodes a video in overlapping segments and blends them. No seams are visible, and the "
            "memory used for decoding does not grow with the length of the video.",
            inputs=[*decoder_inputs(), blend_input()],
            outputs=[io.Image.Output(display_name="image", tooltip="The frames of the video.")],
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
