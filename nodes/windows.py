"""Nodes for sampling videos that are longer or larger than the model or the memory allows."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from comfy_api.v0_0_2 import io

from ..exvideo_core.choices import ANCHORS, FUSES, Anchor, Fuse
from .checks import check_tiles, checked, refuse
from .types import MAX_FRAMES

if TYPE_CHECKING:
    from comfy.clip_vision import ClipVisionModel
    from comfy.model_patcher import ModelPatcher
    from comfy.sd import VAE


class ExVideoWindows(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ExVideoWindows",
            display_name="ExVideo Windows",
            category="ExVideo",
            description="Samples videos longer than the model was trained for, in overlapping windows of frames. "
            "Memory use is that of one window, however long the video is. A video that fits into one window is "
            "sampled as usual.",
            inputs=[
                io.Model.Input("model", tooltip="An SVD model, with or without an ExVideo extension."),
                io.Int.Input(
                    "window_frames",
                    default=128,
                    min=2,
                    max=MAX_FRAMES,
                    tooltip="Frames per window. Use as many as the model was trained for (25 for svd_xt without an "
                    "extension).",
                ),
                io.Int.Input(
                    "overlap_frames",
                    default=32,
                    min=1,
                    max=MAX_FRAMES - 1,
                    tooltip="Frames that neighboring windows share. Higher values keep each window closer to the "
                    "previous one, but take longer.",
                ),
                io.Combo.Input(
                    "fuse",
                    options=list(FUSES),
                    default="sequential",
                    tooltip="How windows are combined. sequential: finishes one window before starting the next, "
                    "which continues it. The other methods denoise all windows at every step and average them, with "
                    "weights that rise toward the middle of a window (pyramid), fade across the overlap "
                    "(overlap-linear), or are all equal (flat).",
                ),
                io.Boolean.Input(
                    "freenoise",
                    default=False,
                    tooltip="Start later windows from the shuffled noise of earlier ones (FreeNoise), so that they "
                    "turn out more alike.",
                ),
                io.Combo.Input(
                    "anchor",
                    options=list(ANCHORS),
                    default="window start",
                    optional=True,
                    tooltip="Image that the windows after the first are conditioned on. window start: the frame at "
                    "the start of the window. first picture: the first frame of the video. none: no image; only the "
                    "overlap connects the windows.",
                ),
                io.Boolean.Input(
                    "closed_loop",
                    default=False,
                    optional=True,
                    tooltip="Make the end of the video lead back into its beginning, for seamless loops.",
                ),
                io.ClipVision.Input(
                    "clip_vision",
                    optional=True,
                    tooltip="With this and the VAE, each window has the image embedding of the frame that it starts "
                    "with, instead of the video's first frame. For fuse sequential with anchor window start.",
                ),
                io.Vae.Input("vae", optional=True, tooltip="Decodes that frame."),
            ],
            outputs=[
                io.Model.Output(
                    display_name="model", tooltip="A patched copy of the model. The input model is not changed."
                )
            ],
        )

    @classmethod
    @checked
    def execute(
        cls,
        model: ModelPatcher,
        window_frames: int,
        overlap_frames: int,
        fuse: Fuse,
        freenoise: bool,
        anchor: Anchor = "window start",
        closed_loop: bool = False,
        clip_vision: ClipVisionModel | None = None,
        vae: VAE | None = None,
    ) -> io.NodeOutput:
        from ..exvideo_core.comfyui.sampling.windows import WindowSettings, with_windows
        from ..exvideo_core.comfyui.vae.conditioning import embedding_of_frame

        if (clip_vision is None) != (vae is None):
            missing = "clip_vision" if clip_vision is None else "vae"
            raise ValueError(f"ExVideo Windows needs clip_vision and vae together: connect {missing} too, or neither.")
        windows = WindowSettings(window_frames, overlap_frames, fuse, anchor, freenoise, closed_loop)
        embed = None if clip_vision is None else partial(embedding_of_frame, clip_vision, vae)
        return io.NodeOutput(with_windows(model, windows, embed))


class ExVideoTiles(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ExVideoTiles",
            display_name="ExVideo Tiles",
            category="ExVideo/advanced",
            description="Denoises large frames in overlapping tiles, blended at every step. Use it for a second pass "
            "over a finished video, at a size that does not fit into memory in one piece. At full denoise, each tile "
            "would generate its own image.",
            inputs=[
                io.Model.Input("model", tooltip="An SVD model, with or without ExVideo Apply and ExVideo Windows."),
                io.Int.Input(
                    "tile_width", default=512, min=128, max=16384, step=64, tooltip="Width of each tile in pixels."
                ),
                io.Int.Input(
                    "tile_height", default=512, min=128, max=16384, step=64, tooltip="Height of each tile in pixels."
                ),
                io.Int.Input(
                    "overlap",
                    default=128,
                    min=0,
                    max=8192,
                    step=8,
                    tooltip="Pixels that neighboring tiles share and blend.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    display_name="model", tooltip="A patched copy of the model. The input model is not changed."
                )
            ],
        )

    @classmethod
    def validate_inputs(
        cls, tile_width: int | None = None, tile_height: int | None = None, overlap: int | None = None
    ) -> bool | str:
        return check_tiles(tile_width, tile_height, overlap) or True

    @classmethod
    @checked
    def execute(cls, model: ModelPatcher, tile_width: int, tile_height: int, overlap: int) -> io.NodeOutput:
        from ..exvideo_core.comfyui.sampling.tiles import TileSettings, with_tiles

        refuse(check_tiles(tile_width, tile_height, overlap))
        return io.NodeOutput(with_tiles(model, TileSettings(tile_width // 8, tile_height // 8, overlap // 8)))
