"""Whether a picture can be decoded, what it is and measures; a part of it.

Knows: formats, the canvas that is allowed, what Pillow raises. Does not know: where bytes come
from, the service; it is used in the service and in its child process (`probe`).
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from PIL import Image, ImageOps, UnidentifiedImageError

from molmo_core.errors import InvalidMedia

_FORMATS = ("JPEG", "PNG", "WEBP", "GIF")
_MIME = {"PNG": "image/png", "WEBP": "image/webp", "GIF": "image/gif"}
_EXIF_ORIENTATION = 0x0112
_TRANSPOSED = frozenset([5, 6, 7, 8])
_KEPT_MODES = ("1", "L", "LA", "P", "RGB", "RGBA")
"""What PNG holds and the engine reads as it would the whole picture."""


@dataclass(frozen=True, kw_only=True)
class Canvas:
    """The largest that is allowed."""

    max_pixels: int
    max_side_px: int
    max_aspect: float

    @property
    def rule(self) -> str:
        return (
            f"allowed are {self.max_pixels:,} pixels, {self.max_side_px:,} a side "
            f"and an aspect of {self.max_aspect:g}:1; scale it down"
        )

    def check(self, size_wh: tuple[int, int], what: str) -> None:
        """Raises InvalidMedia."""
        width, height = size_wh
        short, long = min(size_wh), max(size_wh)
        is_allowed = (
            short >= 1
            and long <= self.max_side_px
            and width * height <= self.max_pixels
            and long <= self.max_aspect * short
        )
        if not is_allowed:
            raise InvalidMedia(f"{what} is {width}x{height} pixels; {self.rule}")


def check_picture(data: bytes, what: str, canvas: Canvas) -> int:
    """Look at the header only; the number of pixels. Raises InvalidMedia."""
    with _opened(data, what, canvas) as picture:
        return picture.width * picture.height


def measure_picture(data: bytes, what: str, canvas: Canvas) -> tuple[tuple[int, int], str]:
    """((height, width) as displayed, media type) of a picture that decodes completely.

    `what` names it in messages. Raises InvalidMedia.
    """
    with _opened(data, what, canvas) as picture:
        picture.load()
        height_width = (picture.height, picture.width)
        if picture.getexif().get(_EXIF_ORIENTATION) in _TRANSPOSED:
            height_width = (picture.width, picture.height)
        return height_width, _MIME.get(picture.format or "", "image/jpeg")


def cut_out(data: bytes, what: str, canvas: Canvas, box: tuple[int, int, int, int]) -> bytes:
    """The part inside `box` (left, top, right, bottom in pixels as displayed) as PNG.

    Raises InvalidMedia.
    """
    with _opened(data, what, canvas) as picture:
        part = ImageOps.exif_transpose(picture).crop(box)
    kept = part if part.mode in _KEPT_MODES else part.convert("RGB")
    buffer = io.BytesIO()
    kept.save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


@contextmanager
def _opened(data: bytes, what: str, canvas: Canvas) -> Iterator[Image.Image]:
    bombs = (Image.DecompressionBombError, Image.DecompressionBombWarning)
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as picture:
            canvas.check(picture.size, what)
            yield picture
    except UnidentifiedImageError as error:
        raise InvalidMedia(
            f"{what} is not a picture that can be read; send JPEG, PNG, WebP or GIF"
        ) from error
    except bombs as error:
        raise InvalidMedia(f"{what} has too many pixels; {canvas.rule}") from error
    # What Pillow's decoders raise for damaged files, by experience.
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError) as error:
        raise InvalidMedia(
            f"{what} is damaged or cut short ({type(error).__name__}); send the complete file"
        ) from error
