"""From data URLs to checked media; nothing unchecked reaches the engine.

Only `data:` URLs are taken: nothing is fetched, no path is opened. Pictures are decoded once in a
worker thread (header first, so a bomb is refused before it unfolds), videos are looked at in a
child process with limited memory and time (`media_probe`).

Knows: formats, limits, what a picture or video measures. Does not know: prompts, the engine.
Source: threat table of the security specification.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import io
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from PIL import Image, ImageOps, UnidentifiedImageError

from molmo_core import api
from molmo_core.errors import InvalidMedia, TooManyMedia
from molmo_core.videos import VideoGeometry, VideoInfo, sample_times
from molmo_server.media_probe import ProbeLimits, is_known_container
from molmo_server.settings import MolmoSettings

_FORMATS = ("JPEG", "PNG", "WEBP", "GIF")
_SHAPE = "send `data:image/png;base64,…` (JPEG, PNG, WebP, GIF) or `data:video/mp4;base64,…`"
_MIME = {"PNG": "image/png", "WEBP": "image/webp", "GIF": "image/gif"}
_EXIF_ORIENTATION = 0x0112
_TRANSPOSED = frozenset([5, 6, 7, 8])


@dataclass(frozen=True, kw_only=True)
class CheckedImage:
    url: str
    """Data URL of the bytes that were checked."""
    size_hw: tuple[int, int]
    """As displayed: after EXIF rotation."""


@dataclass(frozen=True, kw_only=True)
class CheckedVideo:
    url: str
    info: VideoInfo
    frame_times_s: tuple[float, ...] = ()
    """Of the frames that the model sees, see `CheckedMedia.sampled`."""


@dataclass(frozen=True, kw_only=True)
class CheckedMedia:
    """Media of one prompt, in order: images, or one video, or nothing."""

    images: tuple[CheckedImage, ...] = ()
    video: CheckedVideo | None = None

    def sampled(self, geometry: VideoGeometry) -> CheckedMedia:
        """The same, with the times of the frames that a checkpoint of this geometry looks at."""
        if self.video is None:
            return self
        info = self.video.info
        times = sample_times(info.duration_s, geometry, source_fps=info.fps)
        return CheckedMedia(video=replace(self.video, frame_times_s=tuple(times)))

    def described(self) -> list[api.Media]:
        if self.video is not None:
            info = self.video.info
            return [
                api.Media(
                    index=0,
                    type="video",
                    width=info.width_px,
                    height=info.height_px,
                    fps=info.fps,
                    duration=info.duration_s,
                )
            ]
        return [
            api.Media(index=k, type="image", width=image.size_hw[1], height=image.size_hw[0])
            for k, image in enumerate(self.images)
        ]

    def parts(self) -> list[dict[str, object]]:
        """Content parts of a chat message."""
        parts: list[dict[str, object]] = [
            {"type": "image_url", "image_url": {"url": image.url}} for image in self.images
        ]
        if self.video is not None:
            parts.append({"type": "video_url", "video_url": {"url": self.video.url}})
        return parts


class MediaGate:
    """Checks media, at most `max_probes` at a time."""

    def __init__(self, settings: MolmoSettings) -> None:
        self._settings = settings
        self._turns = asyncio.Semaphore(settings.max_probes)

    async def check(self, images: Sequence[str], videos: Sequence[str]) -> CheckedMedia:
        """Check the data URLs of one prompt.

        Raises TooManyMedia, InvalidMedia.
        """
        limit = self._settings.max_images
        if len(images) > limit:
            raise TooManyMedia(
                f"got {len(images)} images, allowed are {limit} in a request; send fewer"
            )
        if len(videos) > 1 or (videos and images):
            raise TooManyMedia(
                f"got {len(images)} images and {len(videos)} videos; "
                f"send up to {limit} images, or one video alone"
            )
        checked = [await self._check_image(url, k) for k, url in enumerate(images)]
        video = await self._check_video(videos[0]) if videos else None
        return CheckedMedia(images=tuple(checked), video=video)

    async def _check_image(self, url: str, index: int) -> CheckedImage:
        what = f"image {index + 1}"
        async with self._turns:
            return await asyncio.to_thread(self._look_at_image, url, what)

    def _look_at_image(self, url: str, what: str) -> CheckedImage:
        mime, encoded, data = _opened(url, what, "image/", self._settings.max_image_bytes)
        size_hw, mime = measure_image(data, what, self._settings)
        return CheckedImage(url=f"data:{mime};base64,{encoded}", size_hw=size_hw)

    async def _check_video(self, url: str) -> CheckedVideo:
        async with self._turns:
            limit = self._settings.max_video_bytes
            mime, encoded, data = await asyncio.to_thread(
                _opened, url, "the video", "video/", limit
            )
            if not is_known_container(data):
                raise InvalidMedia("the video is not mp4, mov, webm or mkv; convert it with ffmpeg")
            info = await probe_in_child(data, self._settings)
        return CheckedVideo(url=f"data:{mime};base64,{encoded}", info=info)


def _opened(url: str, what: str, kind: str, limit: int) -> tuple[str, str, bytes]:
    """(media type, base64 text, bytes); refuses by length before decoding."""
    scheme, _, rest = url.partition(":")
    if scheme.lower() != "data":
        shown = scheme[:20] if rest else "no"
        raise InvalidMedia(
            f"{what} has {shown!r} as URL scheme, only data URLs are taken; {_SHAPE}"
        )
    header, comma, encoded = rest.partition(",")
    mime, *parameters = header.lower().split(";")
    if not comma or not mime.startswith(kind) or "base64" not in parameters:
        raise InvalidMedia(f"{what} begins with 'data:{header[:40]}'; {_SHAPE}")
    _check_length(len(encoded) * 3 // 4 - 2, what, limit)
    try:
        return mime, encoded, base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidMedia(f"{what} is not valid base64 ({error}); {_SHAPE}") from error


def _check_length(n_bytes: int, what: str, limit: int) -> None:
    if n_bytes > limit:
        raise InvalidMedia(
            f"{what} has {n_bytes:,} bytes, allowed are {limit:,}; send a smaller file"
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
        *(sys.executable, "-m", "molmo_server.media_probe", json.dumps(asdict(limits))),
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
