"""What a file is and measures: decided by its bytes, within limits, remembered by their digest.

Pictures are decoded once in a worker thread (header first, so a bomb is refused before it
unfolds), videos are looked at in a child process with limited memory and time (`probe`).

Knows: formats, limits, what a picture or video measures. Does not know: where bytes come from.
Source: threat table of the security specification.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import math
import sys
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Literal

from PIL import Image, ImageOps, UnidentifiedImageError

from molmo_core.errors import InvalidMedia
from molmo_core.videos import VideoInfo
from molmo_server.media.probe import ProbeLimits, container_type
from molmo_server.settings import MolmoSettings

Kind = Literal["image", "video"]

_FORMATS = ("JPEG", "PNG", "WEBP", "GIF")
_MIME = {"PNG": "image/png", "WEBP": "image/webp", "GIF": "image/gif"}
_EXIF_ORIENTATION = 0x0112
_TRANSPOSED = frozenset([5, 6, 7, 8])
_MAX_REMEMBERED_FRAMES = 100_000
"""A video with more (the longest allowed one has 72,000 at 120 a second) is looked at each time:
what is remembered of it takes memory."""


@dataclass(frozen=True, kw_only=True)
class Look:
    """What a file was found to be."""

    sha256: str
    mime: str
    size_hw: tuple[int, int]
    """As displayed: after EXIF rotation, after a video's turning."""
    video: VideoInfo | None = None
    """None for a picture."""


class Looks:
    """Looks at files, and remembers the last ones that were good."""

    def __init__(
        self,
        settings: MolmoSettings,
        on_known: Callable[[], object],
        on_look: Callable[[], object] = lambda: None,
    ) -> None:
        """`on_known` is called whenever a file needs no look because it had one, `on_look` for
        every other."""
        self._settings = settings
        self._on_known = on_known
        self._on_look = on_look
        self._known: OrderedDict[tuple[Kind, str], Look] = OrderedDict()

    async def look(self, data: bytes, what: str, kind: Kind) -> Look:
        """`what` names the file in messages. Raises InvalidMedia."""
        sha256 = await asyncio.to_thread(digest, data)
        known = self._known.get((kind, sha256))
        if known is not None:
            self._known.move_to_end((kind, sha256))
            self._on_known()
            return known
        self._on_look()
        look = await self._first_look(data, sha256, what, kind)
        if look.video is None or look.video.n_frames <= _MAX_REMEMBERED_FRAMES:
            self._known[kind, sha256] = look
        while len(self._known) > self._settings.media_cache_entries:
            self._known.popitem(last=False)
        return look

    async def _first_look(self, data: bytes, sha256: str, what: str, kind: Kind) -> Look:
        if kind == "image":
            size_hw, mime = await asyncio.to_thread(measure_image, data, what, self._settings)
            return Look(sha256=sha256, mime=mime, size_hw=size_hw)
        container = container_type(data)
        if container is None:
            raise InvalidMedia(f"{what} is not mp4, mov, webm or mkv; convert it with ffmpeg")
        info = await probe_in_child(data, self._settings)
        size_hw = (info.height_px, info.width_px)
        return Look(sha256=sha256, mime=container, size_hw=size_hw, video=info)


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def check_length(n_bytes: int, what: str, limit_bytes: int) -> None:
    """Raises InvalidMedia."""
    if n_bytes > limit_bytes:
        raise InvalidMedia(
            f"{what} has {n_bytes:,} bytes, allowed are {limit_bytes:,}; send a smaller file"
        )


def measure_image(data: bytes, what: str, settings: MolmoSettings) -> tuple[tuple[int, int], str]:
    """((height, width) as displayed, media type) of a picture that decodes completely.

    Raises InvalidMedia.
    """
    bombs = (Image.DecompressionBombError, Image.DecompressionBombWarning)
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as picture:
            _check_canvas(picture.size, what, settings)
            picture.load()
            width, height = picture.size
            if picture.getexif().get(_EXIF_ORIENTATION) in _TRANSPOSED:
                width, height = ImageOps.exif_transpose(picture).size
            return (height, width), _MIME.get(picture.format or "", "image/jpeg")
    except UnidentifiedImageError as error:
        raise InvalidMedia(
            f"{what} is not a picture that can be read; send JPEG, PNG, WebP or GIF"
        ) from error
    except bombs as error:
        raise InvalidMedia(f"{what} has too many pixels; {_canvas_rule(settings)}") from error
    # What Pillow's decoders raise for damaged files, by experience.
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError) as error:
        raise InvalidMedia(
            f"{what} is damaged or cut short ({type(error).__name__}); send the complete file"
        ) from error


def _check_canvas(size_wh: tuple[int, int], what: str, settings: MolmoSettings) -> None:
    width, height = size_wh
    short, long = min(size_wh), max(size_wh)
    is_allowed = (
        short >= 1
        and long <= settings.max_image_side_px
        and width * height <= settings.max_image_pixels
        and long <= settings.max_aspect * short
    )
    if not is_allowed:
        raise InvalidMedia(f"{what} is {width}x{height} pixels; {_canvas_rule(settings)}")


def _canvas_rule(settings: MolmoSettings) -> str:
    return (
        f"allowed are {settings.max_image_pixels:,} pixels, {settings.max_image_side_px:,} a side "
        f"and an aspect of {settings.max_aspect:g}:1; scale it down"
    )


async def probe_in_child(data: bytes, settings: MolmoSettings) -> VideoInfo:
    """Look at a video in a limited child process; raises InvalidMedia."""
    limits = ProbeLimits(
        memory_bytes=settings.probe_memory_bytes,
        cpu_s=math.ceil(settings.probe_timeout_s),
        max_duration_s=settings.max_video_duration_s,
        max_side_px=settings.max_video_side_px,
    )
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "molmo_server.media.probe", json.dumps(asdict(limits))),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        async with asyncio.timeout(settings.probe_timeout_s):
            output, _ = await child.communicate(data)
    except TimeoutError:
        output = b""
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()
    answer = json.loads(output) if output and child.returncode == 0 else {}
    if "error" in answer:
        raise InvalidMedia(answer["error"])
    if not answer:
        raise InvalidMedia(
            "looking at the video took too much time or memory, or crashed the reader; "
            "send a smaller video, newly encoded with ffmpeg"
        )
    return VideoInfo(**{**answer, "frame_times_s": tuple(answer["frame_times_s"])})
