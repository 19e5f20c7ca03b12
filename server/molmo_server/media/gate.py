"""From the URLs of a request to checked media; nothing unchecked reaches the engine.

Taken are `data:` URLs, `media://media-…` for an uploaded file, and `http(s)` URLs where the
settings allow them. Whatever the way, the engine is sent the bytes that were looked at.

Knows: ways in, how many media a prompt may have. Does not know: formats (`look`), prompts.
Source: threat table of the security specification.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace

from molmo_core import api
from molmo_core.errors import InvalidMedia, TooManyMedia
from molmo_core.points import Point
from molmo_core.videos import VideoGeometry, VideoInfo, sample_part
from molmo_server.media.crop import touched
from molmo_server.media.handing import MediaFile
from molmo_server.media.look import Kind, Look, Looks, check_length, digest, part_of_image
from molmo_server.media.probe import container_type
from molmo_server.media.remote import RemoteMedia
from molmo_server.media.spool import Spool, Stored
from molmo_server.settings import MolmoSettings

_MAX_SCHEME_CHARS = 20
"""Of a URL that may be a whole video, no more is looked at here."""
_PLACE_DIGITS = 6
_SHAPE = "send `data:image/png;base64,…` (JPEG, PNG, WebP, GIF) or `data:video/mp4;base64,…`"


@dataclass(frozen=True, kw_only=True)
class Cut:
    """A part of a picture, in pixels of the whole."""

    left_px: int
    top_px: int
    whole_hw: tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class CheckedImage:
    file: MediaFile
    size_hw: tuple[int, int]
    """As displayed: after EXIF rotation."""
    sha256: str = ""
    cut: Cut | None = None
    """Where it was cut out of; None for a whole picture."""


@dataclass(frozen=True, kw_only=True)
class CheckedVideo:
    file: MediaFile
    info: VideoInfo
    sha256: str = ""
    frame_times_s: tuple[float, ...] = ()
    """Of the frames that the model sees, as it is told them: seconds from `start_s`. See
    `CheckedMedia.sampled`."""
    start_s: float = 0.0
    """Where the part begins that is sampled, seconds from the begin of the file."""

    @property
    def file_times_s(self) -> tuple[float, ...]:
        return tuple(self.start_s + time_s for time_s in self.frame_times_s)


@dataclass(frozen=True, kw_only=True)
class CheckedMedia:
    """Media of one prompt, in order: images, or one video, or nothing."""

    images: tuple[CheckedImage, ...] = ()
    video: CheckedVideo | None = None

    @property
    def first_sha256(self) -> str:
        """Of the first medium, which stays the first as a conversation goes on; "" without one."""
        first = self.video or next(iter(self.images), None)
        return first.sha256 if first is not None else ""

    def sampled(self, geometry: VideoGeometry) -> CheckedMedia:
        """The same, with the times of the frames that a checkpoint of this geometry looks at.

        Raises InvalidRequest for a part that the video does not have.
        """
        if self.video is None:
            return self
        times = sample_part(self.video.info, geometry)
        video = replace(self.video, frame_times_s=times.clip_s, start_s=times.start_s)
        return CheckedMedia(video=video)

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
        sizes_hw = [image.cut.whole_hw if image.cut else image.size_hw for image in self.images]
        return [
            api.Media(index=k, type="image", width=width, height=height)
            for k, (height, width) in enumerate(sizes_hw)
        ]

    @property
    def is_part(self) -> bool:
        """Whether the model saw less than the caller sent: `in_whole` makes a difference."""
        is_late = self.video is not None and self.video.start_s > 0
        return is_late or any(image.cut is not None for image in self.images)

    def in_whole(self, point: Point) -> Point:
        """A place in what the model saw as a place in what the caller sent."""
        if self.video is not None and point.time_s is not None:
            return replace(point, time_s=self.video.start_s + point.time_s)
        cut = None if self.video else self.images[point.media_index].cut
        if cut is None:
            return point
        height, width = self.images[point.media_index].size_hw
        whole_height, whole_width = cut.whole_hw
        return replace(
            point,
            x=round((cut.left_px + point.x * width) / whole_width, _PLACE_DIGITS),
            y=round((cut.top_px + point.y * height) / whole_height, _PLACE_DIGITS),
        )

    async def parts(self, url_of: Callable[[MediaFile], Awaitable[str]]) -> list[dict[str, object]]:
        """Content parts of a chat message."""
        parts: list[dict[str, object]] = [
            {"type": "image_url", "image_url": {"url": await url_of(image.file)}}
            for image in self.images
        ]
        if self.video is not None:
            url = await url_of(self.video.file)
            parts.append({"type": "video_url", "video_url": {"url": url}})
        return parts


class MediaGate:
    """Checks media, at most `max_probes` at a time."""

    def __init__(
        self,
        settings: MolmoSettings,
        *,
        spool: Spool | None = None,
        remote: RemoteMedia | None = None,
        on_known: Callable[[], object] = lambda: None,
        on_look: Callable[[], object] = lambda: None,
    ) -> None:
        """`on_known` is called for each file that had its look before, `on_look` for each other.

        Start the spool first.
        """
        self.spool = spool or Spool(settings)
        self._settings = settings
        self._remote = remote or RemoteMedia(settings)
        self._looks = Looks(settings, on_known, on_look)
        self._turns = asyncio.Semaphore(settings.max_probes)

    async def check(
        self, images: Sequence[str], videos: Sequence[str], *, owner: str = ""
    ) -> CheckedMedia:
        """Check the media of one prompt by their URLs; uploads are found among the owner's.

        Raises TooManyMedia, InvalidMedia, MediaNotFound.
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
        checked = []
        for k, url in enumerate(images):
            file, look = await self._check(url, f"image {k + 1}", "image", owner)
            checked.append(CheckedImage(file=file, size_hw=look.size_hw, sha256=look.sha256))
        for url in videos:
            file, look = await self._check(url, "the video", "video", owner)
            assert look.video is not None
            return CheckedMedia(video=CheckedVideo(file=file, info=look.video, sha256=look.sha256))
        return CheckedMedia(images=tuple(checked))

    async def part(self, image: CheckedImage, region: api.Region) -> CheckedImage:
        """A region of a checked picture as a picture of its own.

        Raises InvalidRequest for a region too small or too narrow to be looked at.
        """
        box = touched(region, image.size_hw, max_aspect=self._settings.max_aspect)
        left, top, right, bottom = box
        async with self._turns:
            data = await part_of_image(image.file.data, box, image.size_hw, self._settings)
        return CheckedImage(
            file=MediaFile(data=data, mime="image/png"),
            size_hw=(bottom - top, right - left),
            sha256=await asyncio.to_thread(digest, data),
            cut=Cut(left_px=left, top_px=top, whole_hw=image.size_hw),
        )

    async def keep(self, data: bytes, *, owner: str = "") -> api.UploadedMedia:
        """Check a file and store it under its content's id; raises InvalidMedia."""
        kind: Kind = "video" if container_type(data) else "image"
        check_length(len(data), "the file", self._limit_bytes(kind))
        async with self._turns:
            look = await self._looks.look(data, "the file", kind, owner)
        return _uploaded(await self.spool.put(look.sha256, data, owner), look)

    async def facts(self, media_id: str, *, owner: str = "") -> api.UploadedMedia:
        """What an uploaded file is, from a look at it; raises MediaNotFound."""
        data, sha256 = await self.spool.read(media_id, owner)
        async with self._turns:
            kind: Kind = "video" if container_type(data) else "image"
            look = await self._looks.look(data, "the file", kind, owner, sha256=sha256)
        return _uploaded(self.spool.find(media_id, owner), look)

    async def _check(self, url: str, what: str, kind: Kind, owner: str) -> tuple[MediaFile, Look]:
        """(what was looked at, what it is)."""
        limit_bytes = self._limit_bytes(kind)
        scheme = url[:_MAX_SCHEME_CHARS].partition(":")[0].lower()
        encoded, data, sha256 = "", b"", ""
        if scheme == "media":
            data, sha256 = await self.spool.read(url.partition("://")[2], owner)
        elif scheme != "data":  # fetched before it is this one's turn: it may take long
            data = await self._remote.fetch(url, what, limit_bytes)
        async with self._turns:
            if scheme == "data":
                encoded, data = await asyncio.to_thread(_opened, url, what, kind, limit_bytes)
            look = await self._looks.look(data, what, kind, owner, sha256=sha256)
        return MediaFile(data=data, mime=look.mime, encoded=encoded), look

    def _limit_bytes(self, kind: Kind) -> int:
        settings = self._settings
        return settings.max_image_bytes if kind == "image" else settings.max_video_bytes


def _uploaded(stored: Stored, look: Look) -> api.UploadedMedia:
    height, width = look.size_hw
    return api.UploadedMedia(
        id=stored.id,
        type="image" if look.video is None else "video",
        bytes=stored.n_bytes,
        width=width,
        height=height,
        duration=look.video.duration_s if look.video else None,
        fps=look.video.fps if look.video else None,
        created_at=int(stored.created_at_s),
        expires_at=int(stored.expires_at_s),
    )


def _opened(url: str, what: str, kind: Kind, limit_bytes: int) -> tuple[str, bytes]:
    """(base64 text, bytes) of a data URL; refuses by length before decoding."""
    header, comma, encoded = url.partition(":")[2].partition(",")
    mime, *parameters = header.lower().split(";")
    if not comma or not mime.startswith(f"{kind}/") or "base64" not in parameters:
        raise InvalidMedia(f"{what} begins with 'data:{header[:40]}'; {_SHAPE}")
    check_length(len(encoded) * 3 // 4 - 2, what, limit_bytes)
    try:
        return encoded, base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidMedia(f"{what} is not valid base64 ({error}); {_SHAPE}") from error
