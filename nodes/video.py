"""The node that decodes straight into a video file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import folder_paths
from comfy_api.v0_0_2 import InputImpl, io, ui

from ..exvideo_core.choices import CODECS, Blend
from .checks import check_chunks, checked, outside, refuse
from .latents import blend_input, decoder_inputs

if TYPE_CHECKING:
    from comfy.sd import VAE

FPS = (1, 240)


class ExVideoSaveVideo(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ExVideoSaveVideo",
            display_name="ExVideo Decode and Save Video",
            category="ExVideo",
            description="Decodes a latent straight into a video file, segment by segment, without ever holding all "
            "frames in memory. The images are the same as those of ExVideo Decode.",
            inputs=[
                *decoder_inputs(),
                io.MultiType.Input(
                    io.Float.Input(
                        "fps",
                        default=30,
                        min=FPS[0],
                        max=FPS[1],
                        step=0.001,
                        tooltip="Frames per second of the video. 23.976, 29.97 and 59.94 are written as the exact "
                        "broadcast rates (24000/1001 and so on).",
                    ),
                    [io.Int],
                ),
                io.Combo.Input(
                    "codec",
                    options=list(CODECS),
                    default="h264",
                    tooltip="Video codec. h264 plays everywhere, h265 and vp9 produce smaller files, ffv1 is lossless.",
                ),
                io.Int.Input(
                    "quality",
                    default=17,
                    min=0,
                    max=51,
                    tooltip="Constant rate factor (CRF). Lower values give better quality and larger files. ffv1 "
                    "ignores it.",
                ),
                io.String.Input(
                    "filename_prefix",
                    default="video/ExVideo",
                    tooltip="Subfolder and file name prefix, within the output folder.",
                ),
                blend_input(),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
            outputs=[io.Video.Output(display_name="video", tooltip="The saved video.")],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(
        cls, chunk_frames: int | None = None, overlap_frames: int | None = None, fps: float | None = None
    ) -> bool | str:
        return check_chunks(chunk_frames, overlap_frames) or outside("fps", fps, *FPS) or True

    @classmethod
    @checked
    def execute(
        cls,
        vae: VAE,
        latent: dict[str, Any],
        chunk_frames: int,
        overlap_frames: int,
        fps: float,
        codec: str,
        quality: int,
        filename_prefix: str,
        blend: Blend = "smooth",
    ) -> io.NodeOutput:
        from ..exvideo_core.comfyui.vae.decode import decode_segments
        from ..exvideo_core.files.output_file import explain_errors
        from ..exvideo_core.video.writer import VideoWriter

        refuse(check_chunks(chunk_frames, overlap_frames))
        samples = latent["samples"]
        height, width = samples.shape[-2] * 8, samples.shape[-1] * 8
        root = folder_paths.get_output_directory()
        with explain_errors(Path(root, filename_prefix)):
            folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(filename_prefix, root, width, height)
        path = Path(folder) / f"{name}_{counter:05}_{CODECS[codec].suffix}"
        with VideoWriter(path, float(fps), codec, quality, cls._metadata()) as writer:
            for frames in decode_segments(vae, samples, chunk_frames, overlap_frames, blend):
                writer.add((frames * 255).round().clamp(0, 255).byte().cpu().numpy())
        saved = ui.SavedResult(path.name, subfolder, io.FolderType.output)
        return io.NodeOutput(InputImpl.VideoFromFile(str(path)), ui=ui.PreviewVideo([saved]))

    @classmethod
    def _metadata(cls) -> dict[str, str]:
        """The workflow, stored as ComfyUI's own nodes do, unless the user has turned metadata off."""
        from comfy.cli_args import args

        if args.disable_metadata:
            return {}
        found = dict(cls.hidden.extra_pnginfo or {})
        if cls.hidden.prompt is not None:
            found["prompt"] = cls.hidden.prompt
        return {key: json.dumps(value) for key, value in found.items()}
