"""Images and sampled frames, resized, with what the answers point at and how they are cut.

Places are read from the answers' text, as the model is trained to write them: after rounding, and
only what was drawn for this example. Knows: JPEG, tiles, moments. Does not know: HTML, tokens.
"""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from molmo_core.images import ImageGeometry, tiling_of
from molmo_core.points import Grounding, parse_grounding
from molmo_training.data.example import Example, Picture, Tokenized
from molmo_training.data.own.page.tokens import counted
from molmo_training.data.tokenize import Tokenizing

LONGEST_IMAGE_PX, LONGEST_OF_SEVERAL_PX, LONGEST_FRAME_PX, LONGEST_CROP_PX = 560, 340, 240, 160
MOST_FRAMES = 32
_NEAR_S, _NEAR_XY = 0.051, 12
_QUALITY = 80
XY = tuple[float, float]
Groundings = Sequence[tuple[int, Grounding]]
"""What each branch points at, by its number."""


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A place in thousandths of the picture's sides; `trail` leads to it."""

    x: float
    y: float
    name: str
    colour: int
    trail: tuple[XY, ...] = ()
    ring: int = 0
    """How many marks lie on it: it is drawn larger by as much."""


@dataclass(frozen=True, kw_only=True)
class Box:
    """In thousandths of the picture's sides."""

    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True, kw_only=True)
class ShownPicture:
    url: str
    width_px: int
    height_px: int
    caption: str
    shown_px: int
    """Its width on the page."""
    marks: tuple[Mark, ...] = ()
    tiles: tuple[Box, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Legend:
    colour: int
    text: str


@dataclass(frozen=True, kw_only=True)
class ShownMedia:
    pictures: tuple[ShownPicture, ...] = ()
    legends: tuple[Legend, ...] = ()
    note: str = ""


def show_media(example: Example, tokenizing: Tokenizing) -> ShownMedia:
    """Opens the media. Raises InvalidMedia."""
    groundings = list(_groundings(example))
    legends = tuple(_legends(groundings))
    if len(example.frames):
        return _show_video(example, groundings, legends)
    images = enumerate(example.images)
    pictures = tuple(_show_image(k, image, example, groundings, tokenizing) for k, image in images)
    return ShownMedia(pictures=pictures, legends=legends)


def _show_video(
    example: Example, groundings: Groundings, legends: tuple[Legend, ...]
) -> ShownMedia:
    pixels, times_s = np.asarray(example.frames), example.frame_times_s
    height_px, width_px = example.frames[0].shape[:2]
    chosen = _chosen(times_s, groundings)
    pictures = tuple(
        ShownPicture(
            url=jpeg_url(pixels[k], LONGEST_FRAME_PX, (height_px, width_px)),
            width_px=width_px,
            height_px=height_px,
            caption=f"{times_s[k]:.1f} s",
            shown_px=_shown_px(width_px, height_px, LONGEST_FRAME_PX),
            marks=_ringed(list(_marks_at(times_s[k], groundings))),
        )
        for k in chosen
    )
    n_frames, n_shown = len(pixels), len(chosen)
    note = counted(n_frames, "frame") + (f", {n_shown} of them shown" if n_shown < n_frames else "")
    return ShownMedia(pictures=pictures, legends=legends, note=note)


def _show_image(
    k: int, image: Picture, example: Example, groundings: Groundings, tokenizing: Tokenizing
) -> ShownPicture:
    height_px, width_px = image.shape[:2]
    tiles = _tiles((height_px, width_px), tokenizing.image_geometry(example))
    is_one_of_several = len(example.images) > 1
    longest_px = LONGEST_OF_SEVERAL_PX if is_one_of_several else LONGEST_IMAGE_PX
    name = f"image {k + 1}: " if is_one_of_several else ""
    return ShownPicture(
        url=jpeg_url(np.asarray(image), longest_px),
        width_px=width_px,
        height_px=height_px,
        caption=f"{name}{width_px} × {height_px} px, {counted(len(tiles), 'tile')}",
        shown_px=_shown_px(width_px, height_px, longest_px),
        marks=_ringed(list(_marks_in(k, groundings))),
        tiles=tiles,
    )


def _shown_px(width_px: int, height_px: int, longest_px: int) -> int:
    return max(1, round(width_px * min(1.0, longest_px / max(width_px, height_px))))


def show_crops(row: Tokenized, patch_px: int, most: int = 24) -> tuple[str, ...]:
    """The first crops as the tower gets them, as URLs of pictures."""
    urls = []
    for crop in row.crops[:most]:
        n = round(len(crop) ** 0.5)
        pixels = crop.reshape(n, n, patch_px, patch_px, 3).transpose(0, 2, 1, 3, 4)
        side_px = n * patch_px
        urls.append(jpeg_url(pixels.reshape(side_px, side_px, 3), LONGEST_CROP_PX))
    return tuple(urls)


def jpeg_url(
    pixels: NDArray[np.uint8], longest_px: int, size_hw: tuple[int, int] | None = None
) -> str:
    """A data URL; `size_hw` gives the shape to show where pixels were squeezed."""
    height, width = size_hw or (pixels.shape[0], pixels.shape[1])
    shrink = min(1.0, longest_px / max(height, width))
    size = max(1, round(width * shrink)), max(1, round(height * shrink))
    file = io.BytesIO()
    Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(
        file, "JPEG", quality=_QUALITY
    )
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def _groundings(example: Example) -> Iterator[tuple[int, Grounding]]:
    """Of each branch, by its number: what questions and answers point at."""
    is_video = len(example.frames) > 0
    for number, branch in enumerate(example.branches):
        for turn in branch.turns:
            found = parse_grounding(
                turn.text,
                media="video" if is_video else "image",
                n_media=max(1, len(example.images)),
            )
            if found.points or found.tracks:
                yield number, found


def _legends(groundings: Groundings) -> Iterator[Legend]:
    for number, found in groundings:
        labels = [point.label for point in found.points] + [track.label for track in found.tracks]
        what = "track" if found.tracks else "point"
        for label, n_places in Counter(labels).items():
            yield Legend(colour=number, text=f"{label or 'no label'} ({counted(n_places, what)})")


def _marks_in(image: int, groundings: Groundings) -> Iterator[Mark]:
    for number, found in groundings:
        for point in found.points:
            if point.media_index == image:
                yield Mark(x=1000 * point.x, y=1000 * point.y, name=str(point.id), colour=number)


def _marks_at(time_s: float, groundings: Groundings) -> Iterator[Mark]:
    for number, found in groundings:
        for point in found.points:
            if abs((point.time_s or 0.0) - time_s) < _NEAR_S:
                yield Mark(x=1000 * point.x, y=1000 * point.y, name=str(point.id), colour=number)
        for track in found.tracks:
            until = [p for p in track.points if (p.time_s or 0.0) < time_s + _NEAR_S]
            if until and abs((until[-1].time_s or 0.0) - time_s) < _NEAR_S:
                trail = tuple((1000 * p.x, 1000 * p.y) for p in until)
                x, y = trail[-1]
                yield Mark(x=x, y=y, name=str(track.id), colour=number, trail=trail)


def _ringed(marks: list[Mark]) -> tuple[Mark, ...]:
    """So that a mark is seen around those that are drawn over it."""
    return tuple(
        replace(mark, ring=sum(_is_near(mark, other) for other in marks[k + 1 :]))
        for k, mark in enumerate(marks)
    )


def _is_near(a: Mark, b: Mark) -> bool:
    return abs(a.x - b.x) < _NEAR_XY and abs(a.y - b.y) < _NEAR_XY


def _chosen(times_s: Sequence[float], groundings: Groundings) -> list[int]:
    """Evenly of all frames, or of those that answers point into where they are enough."""
    if len(times_s) <= MOST_FRAMES:
        return list(range(len(times_s)))
    marked = [k for k, time_s in enumerate(times_s) if any(_marks_at(time_s, groundings))]
    best = marked if len(marked) >= MOST_FRAMES else range(len(times_s))
    places = np.linspace(0, len(best) - 1, MOST_FRAMES).round().astype(int)
    return [best[k] for k in places.tolist()]


def _tiles(size_hw: tuple[int, int], geometry: ImageGeometry) -> tuple[Box, ...]:
    """The windows that the tower sees one by one, beside the whole."""
    rows, cols = tiling_of(size_hw, geometry)
    height, width = (n * geometry.window_px + geometry.margin_px for n in (rows, cols))
    return tuple(
        Box(
            x=1000 * col * geometry.window_px / width,
            y=1000 * row * geometry.window_px / height,
            width=1000 * geometry.crop_px / width,
            height=1000 * geometry.crop_px / height,
        )
        for row in range(rows)
        for col in range(cols)
    )
