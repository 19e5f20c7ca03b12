"""Pictures and videos as the server takes them: data URLs, uploads, other servers' URLs.

Knows: the kinds of Python value that hold a picture or a video, and how each file type begins.
Does not know: requests, limits of the server (it checks what it is sent). Source: this project's
own; the signatures are those of the file formats.
"""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, cast

import numpy as np
from PIL import Image

from molmo_core.api import UploadedMedia
from molmo_core.errors import InvalidMedia

MediaKind = Literal["image", "video"]


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedMedia:
    """One picture or video as a URL, ready to be sent any number of times."""

    url: str
    kind: MediaKind

    @property
    def may_be_video(self) -> bool:
        """An URL of a file elsewhere need not tell what it is."""
        return self.kind == "video" or not self.url.startswith("data:")

    def content(self) -> bytes:
        """The file in a data URL; raises InvalidMedia for a URL of another kind."""
        if not self.url.startswith("data:"):
            raise InvalidMedia(
                f"{self.url[:60]} is not at hand; give a path, bytes, a PIL picture or an array"
            )
        try:
            return base64.b64decode(self.url.partition(",")[2])
        except ValueError as failure:
            raise InvalidMedia(
                f"the data URL is no base64 ({failure}); encode it anew"
            ) from failure


OneMedia = (
    str
    | os.PathLike[str]
    | bytes
    | BinaryIO
    | Image.Image
    | np.ndarray
    | EncodedMedia
    | UploadedMedia
)
"""A path, a data, http(s) or media URL, the bytes of a file, an open binary file, a PIL picture, an
array of (height, width, 3) or (height, width) uint8, or what `upload` returned. A URL whose ending
does not tell a video is taken as a picture's, except where only a video will do."""
MediaInput = OneMedia | Sequence[OneMedia]

_URL_SCHEMES = ("data:", "http://", "https://", "media://")
_STILL_BRANDS = {b"avif": "image/avif", b"heic": "image/heic", b"mif1": "image/heic"}
_VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi", ".gif")
_SIGNATURES: tuple[tuple[int, bytes, str], ...] = (  # offset, bytes, type
    (0, b"\x89PNG\r\n\x1a\n", "image/png"),
    (0, b"\xff\xd8\xff", "image/jpeg"),
    (8, b"WEBP", "image/webp"),
    (0, b"BM", "image/bmp"),
    (0, b"II*\x00", "image/tiff"),
    (0, b"MM\x00*", "image/tiff"),
    (0, b"GIF8", "image/gif"),
    (4, b"ftyp", "video/mp4"),
    (0, b"\x1a\x45\xdf\xa3", "video/webm"),
    (8, b"AVI ", "video/x-msvideo"),
)


def encode_all(media: MediaInput) -> list[EncodedMedia]:
    """Every picture of `media`, or its one video; raises InvalidMedia for a mixture.

    Reading files and compressing arrays happens here, on the calling thread.
    """
    many = cast("Sequence[OneMedia]", media if isinstance(media, list | tuple) else [media])
    encoded = [encode(one) for one in many]
    n_videos = sum(one.kind == "video" for one in encoded)
    if not encoded or (n_videos and len(encoded) > 1):
        raise InvalidMedia(
            f"got {len(encoded) - n_videos} pictures and {n_videos} videos; "
            "send one or more pictures, or one video"
        )
    return encoded


def encode(media: OneMedia) -> EncodedMedia:
    """One picture or video as a data URL; http(s) and media URLs stay as they are.

    Raises InvalidMedia for a missing file, an unknown file type or another array.
    """
    if isinstance(media, EncodedMedia):
        return media
    if isinstance(media, UploadedMedia):
        return EncodedMedia(url=media.url, kind=media.type)
    if isinstance(media, str) and media.startswith(_URL_SCHEMES):
        return EncodedMedia(url=media, kind=_kind_of_url(media))
    if isinstance(media, np.ndarray):
        media = _image_of_array(media)
    if isinstance(media, Image.Image):
        return _data_url(_png_bytes(media), "a PIL picture")
    if isinstance(media, str | os.PathLike):
        return _data_url(_file_bytes(Path(media)), str(media))
    if isinstance(media, bytes | bytearray | memoryview):
        return _data_url(bytes(media), "the bytes given")
    if hasattr(media, "read"):
        return _data_url(media.read(), "the file given")
    raise InvalidMedia(
        f"cannot send a {type(media).__name__}; give a path, bytes, an open file, a PIL picture, "
        "a numpy array or a data URL"
    )


def media_type(content: bytes) -> str | None:
    """The MIME type that the first bytes tell; None for no known picture or video."""
    for offset, signature, name in _SIGNATURES:
        if content[offset : offset + len(signature)] == signature:
            return _STILL_BRANDS.get(content[8:12], name) if signature == b"ftyp" else name
    return None


def _data_url(content: bytes, source: str) -> EncodedMedia:
    if not isinstance(content, bytes):
        raise InvalidMedia(f"{source} gave {type(content).__name__}; open the file in binary mode")
    found = media_type(content)
    if found is None:
        raise InvalidMedia(
            f"{source} is no picture or video ({len(content)} bytes); "
            "use PNG, JPEG, WebP or GIF, or an mp4, MOV, WebM or Matroska video"
        )
    payload = base64.b64encode(content).decode("ascii")
    kind: MediaKind = "video" if found.startswith("video/") else "image"
    return EncodedMedia(url=f"data:{found};base64,{payload}", kind=kind)


def _kind_of_url(url: str) -> MediaKind:
    if url.startswith("data:"):
        return "video" if url.startswith("data:video/") else "image"
    return "video" if url.split("?")[0].lower().endswith(_VIDEO_SUFFIXES) else "image"


def _file_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as failure:
        reason = failure.strerror or failure
        raise InvalidMedia(f"cannot read {path}: {reason}; give the path of a file") from failure


def _image_of_array(array: np.ndarray) -> Image.Image:
    shape_is_right = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))
    if not shape_is_right or array.dtype != np.uint8 or array.size == 0:
        raise InvalidMedia(
            f"got an array of shape {array.shape} and type {array.dtype}; "
            "a picture is (height, width, 3) or (height, width) of uint8"
        )
    return Image.fromarray(array)


def _png_bytes(image: Image.Image) -> bytes:
    kept = image if image.mode in ("1", "L", "LA", "P", "RGB", "RGBA") else image.convert("RGB")
    buffer = io.BytesIO()
    kept.save(buffer, format="PNG", compress_level=1)  # the link is faster than the compressor
    return buffer.getvalue()
