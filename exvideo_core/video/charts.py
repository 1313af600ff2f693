"""Charts of an extension and images of videos, drawn with Pillow: ComfyUI installs no plotting library."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..choices import Direction
from ..method.distances import Distance
from ..method.extension import Extension, format_widths
from .images import rgb

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw

_PAPER, _INK, _FAINT, _BAR = (250, 250, 248), (40, 40, 44), (205, 205, 205), (52, 101, 164)
#: The color scale at -1, 0 and 1.
_COLD, _MIDDLE, _WARM = np.array([33, 82, 160]), np.array([250, 250, 248]), np.array([186, 44, 40])
_MARGIN, _PANEL, _LINE, _TEXT, _TITLE = 28, 380, 22, 15, 19
_AXIS = 40  # space left of a heat map for its axis labels


def extension_chart(extension: Extension, distances: Sequence[Distance], block: int) -> Image:
    """Draw an overview of an extension: its size, one block's position table, and the distances of all blocks.

    Args:
        extension: the extension.
        distances: distances of the 16 blocks.
        block: index of the block whose position table is drawn.
    """
    from PIL import Image, ImageDraw

    width, height = 3 * _PANEL + 2 * _AXIS + 4 * _MARGIN, _PANEL + 6 * _LINE
    image = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(image)
    dtype = str(extension.dtype).removeprefix("torch.")
    draw.text((_MARGIN, _LINE // 2), extension.name, _INK, _font(_TITLE))
    facts = f"{extension.frames} frames, blocks {format_widths(extension.widths)} wide, {dtype}"
    if extension.few_steps is not None:
        facts += f", distilled for {extension.few_steps}"
    draw.text((_MARGIN, _LINE // 2 + _LINE + 4), facts, _INK, _font(_TEXT))

    table = extension.blocks[block].positions.float()
    unit = torch.nn.functional.normalize(table, dim=1)
    # torch.quantile is limited to 16 million elements.
    limit = max((table.abs().quantile(0.99) if table.numel() < 2**24 else table.abs().max()).item(), 1e-6)
    top, left = 4 * _LINE, _MARGIN
    panels = [
        (f"Positions of block {block + 1} (+-{limit:.2g})", table / limit, "channel", table.shape[1]),
        ("Similarity of frames (cosine)", unit @ unit.T, "frame", table.shape[0]),
    ]
    for title, values, label, count in panels:
        draw.text((left, top - _LINE - 4), title, _INK, _font(_TEXT))
        image.paste(_heat_map(values, _PANEL), (left + _AXIS, top))
        _numbers(draw, left + _AXIS, top, table.shape[0], count, label)
        left += _AXIS + _PANEL + _MARGIN
    _bars(draw, left, top, distances)
    return image


def contact_sheet(rows: Sequence[np.ndarray], labels: Sequence[str], columns: Sequence[str], edge: int = 128) -> Image:
    """Draw rows of images, with labels for rows and columns.

    Args:
        rows: frames of each row, uint8 [N, H, W, 3].
        labels: one per row.
        columns: titles of the columns.
        edge: longest side of an image on the sheet, in pixels.
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
    """Combine two videos into one for comparison. The shorter one stops on its last frame.

    Args:
        first: [T1, H1, W1, C] in 0..1.
        second: [T2, H2, W2, C] in 0..1, scaled to the first one's height (or to its width if placed below it).
        labels: shown above the videos, unless both are empty.
        direction: placement of the second video.

    Returns:
        [max(T1, T2), H, W, 3] in float32, cropped to even sizes, which video codecs require.

    Raises:
        ValueError: as `rgb`.
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
    videos = [first.cpu(), pixels.movedim(1, -1).cpu()]
    frames = max(len(video) for video in videos)
    strips = []
    for video, label in zip(videos, labels, strict=True):
        if len(video) < frames:
            video = torch.cat([video, video[-1:].expand(frames - len(video), -1, -1, -1)])  # noqa: PLW2901
        if any(labels):
            banner = _banner(label, video.shape[2]).to(video)
            video = torch.cat([banner.expand(frames, -1, -1, -1), video], dim=1)  # noqa: PLW2901
        strips.append(video)
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
    """Draw values from -1 (cold) to 1 (warm) as a square image of `edge` pixels, one row per row of the table."""
    from PIL import Image

    x = values.clamp(-1, 1).numpy()[..., None]
    colors = _MIDDLE + np.abs(x) * (np.where(x < 0, _COLD, _WARM) - _MIDDLE)
    return Image.fromarray(colors.round().astype(np.uint8)).resize((edge, edge), Image.Resampling.BOX)


def _numbers(draw: ImageDraw, left: int, top: int, rows: int, columns: int, label: str) -> None:
    """Label the ends of a heat map's axes."""
    font = _font(_TEXT - 2)
    draw.text((left - 6, top), "0", _INK, font, anchor="ra")
    draw.text((left - 6, top + _PANEL - _TEXT), str(rows - 1), _INK, font, anchor="ra")
    draw.text((left - 6, top + _PANEL // 2 - _TEXT), "frame", _INK, font, anchor="ra")
    bottom = top + _PANEL + 4
    draw.text((left, bottom), "0", _INK, font)
    draw.text((left + _PANEL // 2, bottom), label, _INK, font, anchor="ma")
    draw.text((left + _PANEL, bottom), str(columns - 1), _INK, font, anchor="ra")


def _bars(draw: ImageDraw, left: int, top: int, distances: Sequence[Distance]) -> None:
    """Draw one bar chart per kind of distance, with one bar per block."""
    charts = [
        ("Weights (from the base)", [d.weights for d in distances]),
        ("Convolution (from the identity)", [d.convolution for d in distances]),
        ("Positions (from the base)", [d.positions for d in distances]),
    ]
    font, small = _font(_TEXT), _font(_TEXT - 2)
    draw.text((left, top - _LINE - 4), "Distance from the initial weights, by block", _INK, font)
    height, width = _PANEL // len(charts), _PANEL
    for index, (title, values) in enumerate(charts):
        base = top + (index + 1) * height - 12
        known = [value for value in values if value is not None]
        if not known:
            draw.text((left, base - height + _LINE), f"{title}: connect the base model", _INK, small)
            continue
        limit = max(*known, 1e-9)
        draw.text((left, base - height + 12), f"{title}, up to {limit:.2g}", _INK, small)
        draw.line((left, base, left + width, base), _FAINT)
        step = width / len(known)
        for block, value in enumerate(known):
            length = round(value / limit * (height - 3 * _LINE // 2 - 12))
            x = left + block * step
            draw.rectangle((x + 2, base - length, x + step - 3, base), _BAR)
    bottom = top + _PANEL + 4
    draw.text((left, bottom), "block 1", _INK, small)
    draw.text((left + width, bottom), str(len(distances)), _INK, small, anchor="ra")


def _font(size: int):  # noqa: ANN202 - Pillow's, one of two classes
    from PIL import ImageFont

    return ImageFont.load_default(size)


def _text_width(text: str, size: int = _TEXT) -> int:
    return round(_font(size).getlength(text))
