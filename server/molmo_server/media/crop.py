"""A region of a checked picture as a picture of its own, remembering where it was.

Knows: pixels, EXIF. Does not know: requests, prompts, what files are allowed (`look`).
"""

from __future__ import annotations

import io
import math

from PIL import Image, ImageOps

from molmo_core.api import Region
from molmo_core.errors import InvalidRequest
from molmo_server.media.gate import CheckedImage, Cut
from molmo_server.media.handing import MediaFile

_LEAST_SIDE_PX = 2
_KEPT_MODES = ("1", "L", "LA", "P", "RGB", "RGBA")
"""What PNG holds and the engine reads as it would the whole picture."""


def crop(image: CheckedImage, region: Region, *, max_aspect: float) -> CheckedImage:
    """The pixels that `region` touches, after EXIF rotation; takes as long as to decode.

    Raises InvalidRequest for a region too small or too narrow to be looked at.
    """
    height, width = image.size_hw
    left, right = _touched(region.x0, region.x1, width)
    top, bottom = _touched(region.y0, region.y1, height)
    size_hw = bottom - top, right - left
    if min(size_hw) < _LEAST_SIDE_PX or max(size_hw) > max_aspect * min(size_hw):
        raise InvalidRequest(
            f"the region is {size_hw[1]}x{size_hw[0]} of {width}x{height} pixels; at least "
            f"{_LEAST_SIDE_PX} a side and an aspect of at most {max_aspect:g}:1 are needed",
            param="region",
        )
    with Image.open(io.BytesIO(image.file.data)) as picture:
        shown = ImageOps.exif_transpose(picture)
        part = shown.crop((left, top, right, bottom))
    buffer = io.BytesIO()
    kept = part if part.mode in _KEPT_MODES else part.convert("RGB")
    kept.save(buffer, format="PNG", compress_level=1)
    return CheckedImage(
        file=MediaFile(data=buffer.getvalue(), mime="image/png"),
        size_hw=size_hw,
        cut=Cut(left_px=left, top_px=top, whole_hw=image.size_hw),
    )


def _touched(low: float, high: float, side_px: int) -> tuple[int, int]:
    # Rounded: 0.3 of 10 pixels are 3, not a little more.
    return math.floor(round(low * side_px, 6)), math.ceil(round(high * side_px, 6))
