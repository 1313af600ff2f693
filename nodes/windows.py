"""Nodes that sample what is longer or larger than the model is made for, or than memory holds."""

from __future__ import annotations

from typing import TYPE_CHECKING

from comfy_api.v0_0_2 import io

from ..exvideo_core.choices import ANCHORS, FUSES, Anchor, Fuse
from .checks import check_tiles, checked, refuse
from .types import MAX_FRAMES

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher


class ExVideoWindows(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ExVideoWindows",
            display_name="ExVideo Windows",
            category="ExVideo",
            description="Samples clips longer than the model was trained for, in windows of frames that overlap. "
            "Memory is that of one window however long the clip is. A clip no longer than a window is sampled as "
            "without this node.",
            inputs=[
                io.Model.Input("model", tooltip="An SVD model, from ExVideo Apply or as it is."),
                io.Int.Input(
                    "window_frames",
                    default=128,
                    min=2,
                    max=MAX_FRAMES,
                    tooltip="Frames of a window: as many as the model was trained for (25 for svd_xt without an "
                    "extension).",
                ),
                io.Int.Input(
                    "overlap_frames",
                    default=32,
                    min=1,
                    max=MAX_FRAMES - 1,
                    tooltip="Frames that neighbouring windows share. More of them hold a window closer to the one "
                    "before, and take longer.",
                ),
                io.Combo.Input(
                    "fuse",
                    options=list(FUSES),
                    default="sequential",
                    tooltip="sequential: one window is finished after the other, each held to what the one before has "
                    "made. The others denoise all windows at every step and average them: with weights that rise to a "
                    "window's middle (pyramid), that fade over the overlap (overlap-linear), or all alike (flat).",
                ),
                io.Boolean.Input(
                    "freenoise",
                    default=False,
                    tooltip="Later windows begin from the noise of earlier ones, shuffled (FreeNoise), so that they "
                    "come out more alike.",
                ),
                io.Combo.Input(
                    "anchor",
                    options=list(ANCHORS),
                    default="window start",
                    optional=True,
                    tooltip="The picture that windows past the first begin with. window start: the frame that is "
                    "there. first picture: the clip's own first one. none: no picture, only the overlap holds them.",
                ),
                io.Boolean.Input(
                    "closed_loop",
                    default=False,
                    optional=True,
                    tooltip="The clip's end goes over into its beginning, for videos that repeat without a cut.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="A clone that samples so; the input stays as it was.")
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
    ) -> io.NodeOutput:
        from ..exvideo_core.comfyui.sampling.windows import WindowSettings, with_windows

        windows = WindowSettings(window_frames, overlap_frames, fuse, anchor, freenoise, closed_loop)
        return io.NodeOutput(with_windows(model, windows))


class ExVideoTiles(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ExVideoTiles",
            display_name="ExVideo Tiles",
            category="ExVideo/advanced",
            description="Denoises large pictures in overlapping tiles, blended at every step. For the second pass of a "
            "finished clip at a size that memory does not hold at once; at full denoise each tile would make a picture "
            "of its own.",
            inputs=[
                io.Model.Input("model", tooltip="An SVD model, from ExVideo Apply, ExVideo Windows or as it is."),
                io.Int.Input(
                    "tile_width", default=512, min=128, max=16384, step=64, tooltip="Width of a tile in pixels."
                ),
                io.Int.Input(
                    "tile_height", default=512, min=128, max=16384, step=64, tooltip="Height of a tile in pixels."
                ),
                io.Int.Input(
                    "overlap",
                    default=128,
                    min=0,
                    max=8192,
                    step=8,
                    tooltip="Pixels that neighbouring tiles share and fade over.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="A clone that samples so; the input stays as it was.")
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
