"""What a file is and measures: decided by its bytes, within limits, remembered by their digest.

Pictures are decoded once in a worker thread (header first, so a bomb is refused before it
unfolds), videos and large pictures in a child process with limited memory and time (`probe`).

Knows: limits, what a picture or video measures. Does not know: where bytes come from.
Source: threat table of the security specification.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import math
import sys
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from molmo_core.errors import InvalidMedia
from molmo_core.videos import VideoInfo
from molmo_server.media.crop import Box
from molmo_server.media.pictures import Canvas, check_picture, cut_out, measure_picture
from molmo_server.media.probe import ChildLimits, VideoLimits, container_type
from molmo_server.settings import MolmoSettings

Kind = Literal["image", "video"]

_APART_FROM_PX = 16_000_000
"""Decoders take up to 16 bytes for a pixel: larger pictures are decoded in a child process."""


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
        self._known: OrderedDict[tuple[Kind, str, str], Look] = OrderedDict()

    async def look(
        self, data: bytes, what: str, kind: Kind, owner: str = "", *, sha256: str = ""
    ) -> Look:
        """`what` names the file in messages; how long a look takes tells nobody what others sent.

        `sha256` where it is known. Raises InvalidMedia.
        """
        sha256 = sha256 or await asyncio.to_thread(digest, data)
        key = (kind, sha256, owner)
        known = self._known.get(key)
        if known is not None:
            self._known.move_to_end(key)
            self._on_known()
            return known
        self._on_look()
        look = await self._first_look(data, sha256, what, kind)
        self._known[key] = look
        while len(self._known) > self._settings.media_cache_entries:
            self._known.popitem(last=False)
        return look

    async def _first_look(self, data: bytes, sha256: str, what: str, kind: Kind) -> Look:
        if kind == "image":
            n_pixels = await asyncio.to_thread(check_picture, data, what, _canvas(self._settings))
            if n_pixels < _APART_FROM_PX:
                size_hw, mime = await asyncio.to_thread(measure_image, data, what, self._settings)
            else:
                size_hw, mime = await _measure_apart(data, what, self._settings)
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
    return measure_picture(data, what, _canvas(settings))


async def _measure_apart(
    data: bytes, what: str, settings: MolmoSettings
) -> tuple[tuple[int, int], str]:
    """As `measure_image`, of a picture whose decoding takes much memory: in a child process."""
    answer = await _ask_child(data, "picture", asdict(_canvas(settings)), what, settings)
    height, width = answer["size_hw"]
    return (height, width), answer["mime"]


async def part_of_image(
    data: bytes, box: Box, size_hw: tuple[int, int], settings: MolmoSettings
) -> bytes:
    """PNG of a part of a picture that had its look; raises InvalidMedia."""
    canvas, what = _canvas(settings), "the image"
    if math.prod(size_hw) < _APART_FROM_PX:
        return await asyncio.to_thread(cut_out, data, what, canvas, box)
    answer = await _ask_child(data, "part", asdict(canvas) | {"box": box}, what, settings)
    return base64.b64decode(answer["png"])


def _canvas(settings: MolmoSettings) -> Canvas:
    return Canvas(
        max_pixels=settings.max_image_pixels,
        max_side_px=settings.max_image_side_px,
        max_aspect=settings.max_aspect,
    )


async def probe_in_child(data: bytes, settings: MolmoSettings) -> VideoInfo:
    """Look at a video in a limited child process; raises InvalidMedia."""
    limits = VideoLimits(
        max_duration_s=settings.max_video_duration_s,
        max_side_px=settings.max_video_side_px,
        max_frames=settings.max_video_frames,
    )
    answer = await _ask_child(data, "video", asdict(limits), "the video", settings)
    return VideoInfo(**{**answer, "frame_times_s": tuple(answer["frame_times_s"])})


async def _ask_child(
    data: bytes, kind: str, limits: dict[str, Any], what: str, settings: MolmoSettings
) -> dict[str, Any]:
    """What the child found; raises InvalidMedia."""
    costs = ChildLimits(
        memory_bytes=settings.probe_memory_bytes, cpu_s=math.ceil(settings.probe_timeout_s)
    )
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "molmo_server.media.probe", kind, what),
        *(json.dumps(asdict(costs)), json.dumps(limits)),
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
    answer: dict[str, Any] = json.loads(output) if output and child.returncode == 0 else {}
    if "error" in answer:
        raise InvalidMedia(answer["error"])
    if not answer:
        raise InvalidMedia(
            f"looking at {what} took too much time or memory, or crashed the reader; "
            f"send a smaller {kind}, newly encoded"
        )
    return answer
