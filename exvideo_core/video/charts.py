"""Pictures of an extension and of clips, drawn with Pillow: ComfyUI brings it, and no plotting library."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..choices import Direction
from ..method.distances import Distance
from ..method.extension import Extension, width_runs
from .images import rgb

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw

_PAPER, _INK, _FAINT, _BAR = (250, 250, 248), (40, 40, 44), (205, 205, 205), (52, 101, 164)
#: Ends and middle of the colour scale: below zero, zero, above.
_COLD, _MIDDLE, _WARM = np.array([33, 82, 160]), np.array([250, 250, 248]), np.array([186, 44, 40])
_MARGIN, _PANEL, _LINE, _TEXT, _TITLE = 28, 380, 22, 15, 19
_AXIS = 40  # left of a heat map, for its numbers


def extension_chart(extension: Extension, distances: Sequence[Distance], block: int) -> Image:
    """An extension at a glance: its size, one block's position table, and how far each block is from its start.

    Args:
        distances: of the 16 blocks.
        block: index of the block whose table is drawn.
    """
    from PIL import Image, ImageDraw

    width, height = 3 * _PANEL + 2 * _AXIS + 4 * _MARGIN, _PANEL + 6 * _LINE
    picture = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(picture)
    dtype = str(extension.dtype).removeprefix("torch.")
    draw.text((_MARGIN, _LINE // 2), extension.name, _INK, _font(_TITLE))
    facts = f"{extension.frames} frames, blocks {width_runs(extension.widths)} wide, {dtype}"
    draw.text((_MARGIN, _LINE // 2 + _LINE + 4), facts, _INK, _font(_TEXT))

    table = extension.blocks[block].positions.float()
    unit = torch.nn.functional.normalize(table, dim=1)
    # torch's quantile takes no more than 16 million numbers.
    limit = max((table.abs().quantile(0.99) if table.numel() < 2**24 else table.abs().max()).item(), 1e-6)
    top, left = 4 * _LINE, _MARGIN
    panels = [
        (f"Positions of block {block + 1} (+-{limit:.2g})", table / limit, "channel", table.shape[1]),
        ("Likeness of frames (cosine)", unit @ unit.T, "frame", table.shape[0]),
    ]
    for title, values, label, count in panels:
        draw.text((left, top - _LINE - 4), title, _INK, _font(_TEXT))
        picture.paste(_heat_map(values, _PANEL), (left + _AXIS, top))
        _numbers(draw, left + _AXIS, top, table.shape[0], count, label)
        left += _AXIS + _PANEL + _MARGIN
    _bars(draw, left, top, distances)
    return picture


def contact_sheet(rows: Sequence[np.ndarray], labels: Sequence[str], columns: Sequence[str], edge: int = 128) -> Image:
    """Pictures in rows, with a label at the left of each and one above each column.

    Args:
        rows: frames of each row, uint8 [N, H, W, 3].
        edge: longest side of a picture on the sheet, in pixels.
    """
    from PIL import Image, ImageDraw

    height, width = rows[0].shape[1:3]
    scale = edge / max(height, width)
    height, width = max(round(height * scale), 1), max(round(width * scale), 1)
    gap = 4
    left = gap + max(_text_width(label) for label in labels) + 2 * gap
    sheet = Image.new(
        "RGB", (left + max(map(len, rows)) * (width + gap), _LINE + gap + len(rows) * (height + gap)), _PAPER
    )
    draw = ImageDraw.Draw(sheet)
    for index, column in enumerate(columns):
        draw.text((left + index * (width + gap), gap), column, _INK, _font(_TEXT))
    for number, (row, label) in enumerate(zip(rows, labels, strict=True)):
        top = _LINE + gap + number * (height + gap)
        draw.text((gap, top + (height - _TEXT) // 2), label, _INK, _font(_TEXT))
        for index, frame in enumerate(row):
            sheet.paste(Image.fromarray(frame).resize((width, height)), (left + index * (width + gap), top))
    return sheet


def stack_clips(
    first: torch.Tensor,
    second: torch.Tensor,
    labels: tuple[str, str] = ("", ""),
    direction: Direction = "side by side",
) -> torch.Tensor:
    """Two clips in one picture, for comparison. The shorter one stands still at its end.

    Args:
        first: [T, H, W, C] in 0..1.
        second: the same of any length and size; it is scaled to the first one's height, or width if below it.
        labels: shown above each, where they are not empty.

    Returns:
        [T, H, W, 3] in float32, T being the longer one's, both sides even, as video codecs need them.
    """
    across = direction == "side by side"
    first, second = rgb(first, "first"), rgb(second, "second")
    height, width = first.shape[1:3]
    factor = height / second.shape[1] if across else width / second.shape[2]
    size = (max(round(second.shape[1] * factor), 1), max(round(second.shape[2] * factor), 1))
    pixels = second.movedim(-1, 1)
    if size != tuple(second.shape[1:3]):
        mode = "bilinear" if factor < 1 else "bicubic"
        pixels = torch.nn.functional.interpolate(pixels, size, mode=mode, antialias=factor < 1).clamp(0, 1)
    clips = [first.cpu(), pixels.movedim(1, -1).cpu()]
    frames = max(len(clip) for clip in clips)
    strips = []
    for clip, label in zip(clips, labels, strict=True):
        held = torch.cat([clip, clip[-1:].expand(frames - len(clip), -1, -1, -1)]) if len(clip) < frames else clip
        if any(labels):
            banner = _banner(label, held.shape[2]).to(held)
            held = torch.cat([banner.expand(frames, -1, -1, -1), held], dim=1)
        strips.append(held)
    joined = torch.cat(strips, dim=2 if across else 1)
    return joined[:, : joined.shape[1] // 2 * 2 or 1, : joined.shape[2] // 2 * 2 or 1]


def _banner(text: str, width: int) -> torch.Tensor:
    """A line of text, [1, H, width, 3]."""
    from PIL import Image, ImageDraw

    size = _TEXT
    while size > 8 and _text_width(text, size) > width - 8:
        size -= 1
    strip = Image.new("RGB", (width, _LINE), _PAPER)
    ImageDraw.Draw(strip).text((4, (_LINE - size) // 2 - 1), text, _INK, _font(size))
    return torch.from_numpy(np.asarray(strip, np.float32) / 255)[None]


def _heat_map(values: torch.Tensor, edge: int) -> Image:
    """Rows downwards, from cold (-1) to warm (1), scaled to a square: averaged where it shrinks."""
    from PIL import Image

    x = values.clamp(-1, 1).numpy()[..., None]
    colours = _MIDDLE + np.abs(x) * (np.where(x < 0, _COLD, _WARM) - _MIDDLE)
    picture = Image.fromarray(colours.round().astype(np.uint8))
    return picture.resize((edge, edge), Image.Resampling.BOX)


def _numbers(draw: ImageDraw, left: int, top: int, rows: int, columns: int, label: str) -> None:
    """Ends of both axes of a heat map."""
    font = _font(_TEXT - 2)
    draw.text((left - 6, top), "0", _INK, font, anchor="ra")
    draw.text((left - 6, top + _PANEL - _TEXT), str(rows - 1), _INK, font, anchor="ra")
    draw.text((left - 6, top + _PANEL // 2 - _TEXT), "frame", _INK, font, anchor="ra")
    bottom = top + _PANEL + 4
    draw.text((left, bottom), "0", _INK, font)
    draw.text((left + _PANEL // 2, bottom), label, _INK, font, anchor="ma")
    draw.text((left + _PANEL, bottom), str(columns - 1), _INK, font, anchor="ra")


def _bars(draw: ImageDraw, left: int, top: int, distances: Sequence[Distance]) -> None:
    """One small chart for each kind of distance, a bar for each block."""
    charts = [
        ("Weights, from the base's", [d.weights for d in distances]),
        ("Convolution, from the identity", [d.convolution for d in distances]),
        ("Positions, from the base's", [d.positions for d in distances]),
    ]
    font, small = _font(_TEXT), _font(_TEXT - 2)
    draw.text((left, top - _LINE - 4), "Distance from the start, by block", _INK, font)
    height, width = _PANEL // len(charts), _PANEL
    for index, (title, values) in enumerate(charts):
        base = top + (index + 1) * height - 12
        known = [value for value in values if value is not None]
        if not known:
            draw.text((left, base - height + _LINE), f"{title}: connect the base model", _INK, small)
            continue
        most = max(*known, 1e-9)
        draw.text((left, base - height + 12), f"{title}, up to {most:.2g}", _INK, small)
        draw.line((left, base, left + width, base), _FAINT)
        step = width / len(known)
        for block, value in enumerate(known):
            tall = round(value / most * (height - 3 * _LINE // 2 - 12))
            x = left + block * step
            draw.rectangle((x + 2, base - tall, x + step - 3, base), _BAR)
    bottom = top + _PANEL + 4
    draw.text((left, bottom), "block 1", _INK, small)
    draw.text((left + width, bottom), str(len(distances)), _INK, small, anchor="ra")


def _font(size: int):  # noqa: ANN202 - Pillow's, one of two classes
    from PIL import ImageFont

    return ImageFont.load_default(size)


def _text_width(text: str, size: int = _TEXT) -> int:
    return round(_font(size).getlength(text))
