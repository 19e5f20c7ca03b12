"""Points on a picture: numbered dots where they are, and a legend below.

Knows: colours, dots, numbers, lettering. Does not know: HTTP, videos (`draw_video`). The picture
keeps its size and place; the legend is a strip added under it. Source: this project's own.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from molmo_client.media import OneMedia, encode
from molmo_core.api import Point
from molmo_core.errors import InvalidMedia

Rgb = tuple[int, int, int]

# Told apart by their lightness as well, and unlike the colours that photographs are full of.
PALETTE: tuple[Rgb, ...] = (
    (255, 0, 170),
    (0, 220, 255),
    (170, 255, 0),
    (255, 120, 0),
    (140, 60, 255),
    (255, 235, 60),
    (0, 120, 90),
    (255, 150, 200),
)
_WHITE, _BLACK = (255, 255, 255), (0, 0, 0)
_LONGEST_LABEL = 60
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True, kw_only=True, slots=True)
class Style:
    """Sizes in pixels that suit a picture of one size."""

    dot_radius_px: int
    ring_px: int
    text_px: int

    @classmethod
    def for_size(cls, width_px: int, height_px: int) -> Style:
        diagonal_px = float(np.hypot(width_px, height_px))
        return cls(
            dot_radius_px=max(3, round(0.010 * diagonal_px)),
            ring_px=max(1, round(0.003 * diagonal_px)),
            text_px=min(48, max(11, round(0.024 * diagonal_px))),
        )


def colour_of(index: int) -> Rgb:
    return PALETTE[index % len(PALETTE)]


def draw_points(image: OneMedia, points: Sequence[Point], *, media_index: int = 0) -> Image.Image:
    """A new RGB picture with those of `points` that lie in the picture `media_index` of the
    question; one colour a label, the point's id beside it.

    Raises InvalidMedia for what is no picture.
    """
    canvas = open_image(image)
    style = Style.for_size(*canvas.size)
    here = [point for point in points if point.media_index == media_index]
    labels = list(dict.fromkeys(point.label or "" for point in here))
    draw = ImageDraw.Draw(canvas)
    for point in here:
        x_px, y_px = point.x * canvas.width, point.y * canvas.height
        colour = colour_of(labels.index(point.label or ""))
        draw_tag(draw, x_px, y_px, str(point.id), colour, style, canvas.size)
    for point in here:  # after all tags: no number may hide a dot
        colour = colour_of(labels.index(point.label or ""))
        draw_dot(draw, point.x * canvas.width, point.y * canvas.height, colour, style)
    return _with_legend(canvas, Counter(point.label or "" for point in here), style)


def open_image(image: OneMedia) -> Image.Image:
    """The picture as RGB, turned as its EXIF data say, in memory of its own."""
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    if isinstance(image, Image.Image):
        return ImageOps.exif_transpose(image).convert("RGB").copy()
    encoded = encode(image)
    if encoded.may_be_video:
        raise InvalidMedia("can draw only on a picture at hand; give a path, bytes or an array")
    content = encoded.content()
    try:
        with Image.open(io.BytesIO(content)) as opened:
            return ImageOps.exif_transpose(opened).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as failure:
        raise InvalidMedia(f"cannot draw on the picture: {failure}; use a PNG or JPEG") from failure


def save_image(image: Image.Image, path: str | Path) -> None:
    """Raises InvalidMedia when the file cannot be written or its suffix names no format."""
    try:
        image.save(path)
    except (OSError, ValueError) as failure:
        raise InvalidMedia(f"cannot write {path}: {failure}; name a .png or .jpg file") from failure


def draw_dot(
    draw: ImageDraw.ImageDraw, x_px: float, y_px: float, colour: Rgb, style: Style
) -> None:
    """A disc in a white and a black ring, to be seen on any background."""
    for radius_px, fill in (
        (style.dot_radius_px + 2 * style.ring_px, _BLACK),
        (style.dot_radius_px + style.ring_px, _WHITE),
        (style.dot_radius_px, colour),
    ):
        draw.circle((x_px, y_px), radius_px, fill=fill)


def draw_tag(
    draw: ImageDraw.ImageDraw,
    x_px: float,
    y_px: float,
    text: str,
    colour: Rgb,
    style: Style,
    size: tuple[int, int],
) -> None:
    """`text` on a small plate right of the dot, or left of it at the right edge."""
    font = ImageFont.load_default(style.text_px)
    width_px, height_px = draw.textlength(text, font=font), 1.25 * style.text_px
    away_px, pad_px = style.dot_radius_px + 2 * style.ring_px + 1, 0.25 * style.text_px
    plate_px = width_px + 2 * pad_px
    fits = x_px + away_px + plate_px <= size[0]
    left_px = x_px + away_px if fits else max(0.0, x_px - away_px - plate_px)
    top_px = min(max(0.0, y_px - height_px / 2), max(0.0, size[1] - height_px))
    box = (left_px, top_px, left_px + plate_px, top_px + height_px)
    draw.rounded_rectangle(box, radius=pad_px, fill=_BLACK, outline=colour)
    middle = (left_px + plate_px / 2, top_px + height_px / 2)
    draw.text(middle, text, fill=_WHITE, font=font, anchor="mm")


def shown_label(label: str) -> str:
    """One short line of a label that a model wrote."""
    line = " ".join(label.split()) or "point"
    return line if len(line) <= _LONGEST_LABEL else f"{line[: _LONGEST_LABEL - 1]}…"


def _with_legend(canvas: Image.Image, counts: Counter[str], style: Style) -> Image.Image:
    if not counts:
        return canvas
    line_px = round(1.6 * style.text_px)
    sheet = Image.new("RGB", (canvas.width, canvas.height + line_px * len(counts)), _WHITE)
    sheet.paste(canvas)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(style.text_px)
    for row, (label, n_points) in enumerate(counts.items()):
        middle_px = canvas.height + (row + 0.5) * line_px
        box = (0.4 * line_px, middle_px - 0.25 * line_px, 0.9 * line_px, middle_px + 0.25 * line_px)
        draw.rectangle(box, fill=colour_of(row))
        text = f"{shown_label(label)} ({n_points})"
        draw.text((1.2 * line_px, middle_px), text, fill=_BLACK, font=font, anchor="lm")
    return sheet
