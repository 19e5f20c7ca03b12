"""The media of a row, as far as text depends on them: how many, their sizes, their times.

Knows: shapes and frame times. Does not know: files, pixels, crops.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from molmo_training.data.example import Picture
from molmo_training.data.formatting.row import XY, Row, invalid, number, optional_number


@dataclass(frozen=True, kw_only=True)
class RowMedia:
    """Images, or the sampled frames of one video with their times; each of shape (H, W, 3)."""

    images: Sequence[Picture] = ()
    frames: Sequence[Picture] = ()
    frame_times_s: Sequence[float] = ()


TEXT_ONLY = RowMedia()


def scale_of(row: Row, media: RowMedia, image: int = 0) -> XY:
    """What the row's points are counted in: `point_scale`, `width` and `height`, or pixels."""
    scale = optional_number(row, "point_scale")
    if scale is not None:
        scale_xy = scale, scale
    elif row.get("width") is not None or row.get("height") is not None:
        scale_xy = number(row, "width"), number(row, "height")
    else:
        pictures = media.images if len(media.images) else media.frames
        if image >= len(pictures):
            raise invalid(row, "point_scale", "it, or width and height, where there is no picture")
        height, width = pictures[image].shape[:2]
        scale_xy = float(width), float(height)
    if min(scale_xy) <= 0:
        raise invalid(row, "point_scale", "a scale above 0")
    return scale_xy
