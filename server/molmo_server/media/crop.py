"""Which pixels of a picture a region means.

Knows: pixels. Does not know: files, requests, prompts.
"""

from __future__ import annotations

import math

from molmo_core.api import Region
from molmo_core.errors import InvalidRequest

Box = tuple[int, int, int, int]
"""Left, top, right, bottom, in pixels as displayed; the last two are one past the end."""
_LEAST_SIDE_PX = 2


def touched(region: Region, size_hw: tuple[int, int], *, max_aspect: float) -> Box:
    """The pixels that `region` touches; raises InvalidRequest when they are too few or narrow."""
    height, width = size_hw
    left, right = _touched(region.x0, region.x1, width)
    top, bottom = _touched(region.y0, region.y1, height)
    short, long = sorted((right - left, bottom - top))
    if short < _LEAST_SIDE_PX or long > max_aspect * short:
        raise InvalidRequest(
            f"the region is {right - left}x{bottom - top} of {width}x{height} pixels; at least "
            f"{_LEAST_SIDE_PX} a side and an aspect of at most {max_aspect:g}:1 are needed",
            param="region",
        )
    return left, top, right, bottom


def _touched(low: float, high: float, side_px: int) -> tuple[int, int]:
    # Rounded: 0.3 of 10 pixels are 3, not a little more.
    return math.floor(round(low * side_px, 6)), math.ceil(round(high * side_px, 6))
