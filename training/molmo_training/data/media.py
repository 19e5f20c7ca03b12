"""Pictures and videos of rows, opened when their pixels are needed.

A picture knows its shape from its header, a video its size and frame times from its packets.
Knows: files, EXIF orientation. Does not know: rows, crops, which frames are sampled.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from typing import Any, BinaryIO, Protocol, overload

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from molmo_core.errors import InvalidMedia
from molmo_core.videos import VideoInfo, probe_video
from molmo_hf.image_processing_molmo2 import rgb_pixels
from molmo_hf.video_io import decode_frames
from molmo_training.data.example import Picture

Source = bytes | str | PathLike[str]
_EXIF_ORIENTATION = 0x0112
_TURNED = frozenset([5, 6, 7, 8])
_PNG_HEAD_BYTES = 8
_UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)
"""What Pillow raises for damaged files, by experience."""


class PictureFile:
    """A picture in a file, in bytes or opened by Pillow; its pixels are those a server sees."""

    def __init__(self, source: Source | Image.Image) -> None:
        self.source = source

    @cached_property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, 3) as displayed, of the header. Raises InvalidMedia."""
        try:
            with _opened(self.source) as picture:
                width, height = picture.size
                turned = _is_turned(picture)
        except _UNREADABLE as error:
            raise unreadable(self.source, "picture", error) from error
        return (width, height, 3) if turned else (height, width, 3)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[np.uint8]:
        try:
            with _opened(self.source) as picture:
                pixels: NDArray[np.uint8] = rgb_pixels(picture)
                return pixels
        except (*_UNREADABLE, InvalidMedia) as error:
            raise unreadable(self.source, "picture", error) from error


def _is_turned(picture: Image.Image) -> bool:
    """As its EXIF data say. Pillow would decode a PNG to look for them behind its pixels."""
    file = getattr(picture, "fp", None)
    if picture.format == "PNG" and "exif" not in picture.info and file is not None:
        position = file.tell()
        is_plain = b"eXIf" not in _png_chunks(file)
        file.seek(position)
        if is_plain:
            return False
    return picture.getexif().get(_EXIF_ORIENTATION) in _TURNED


def _png_chunks(file: BinaryIO) -> list[bytes]:
    """The names of its chunks; a file that ends early has no more."""
    names = []
    file.seek(_PNG_HEAD_BYTES)
    while len(head := file.read(8)) == 8:
        names.append(head[4:])
        file.seek(int.from_bytes(head[:4], "big") + 4, os.SEEK_CUR)
    return names


@contextmanager
def _opened(source: Source | Image.Image) -> Iterator[Image.Image]:
    if isinstance(source, Image.Image):
        yield source
        return
    with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as picture:
        yield picture


def unreadable(source: object, what: str, error: Exception) -> InvalidMedia:
    name = f"the {what} {source}" if isinstance(source, str | PathLike) else f"a {what}"
    if isinstance(error, FileNotFoundError):
        return InvalidMedia(f"{name} is not there: put the file where the dataset names it")
    return InvalidMedia(f"{name} cannot be read ({type(error).__name__}): replace the file")


def open_picture(source: Any) -> Picture:
    """A picture of whatever a row holds: a path, bytes, a Pillow image, an array, a mapping of
    `bytes` or `path` as Hugging Face's datasets have it, or what is a `Picture` already."""
    if isinstance(source, Mapping):
        source = source.get("bytes") or source.get("path")
    if isinstance(source, Image.Image | bytes | str | PathLike):
        return PictureFile(source)
    shape, dtype = getattr(source, "shape", None), getattr(source, "dtype", np.uint8)
    if shape is None or len(shape) != 3 or shape[2] != 3 or dtype != np.uint8:
        raise InvalidMedia(
            f"a picture of type {type(source).__name__}, shape {shape} and {dtype} is none: give "
            "a path, bytes, a Pillow image or (H, W, 3) bytes"
        )
    picture: Picture = source
    return picture


class Video(Protocol):
    """A video whose frames are opened by their times."""

    @property
    def info(self) -> VideoInfo: ...

    @property
    def size_hw(self) -> tuple[int, int]:
        """Of a frame as it is displayed; a turned file says of itself how it is stored."""
        ...

    def frames_at(self, times_s: Sequence[float], size_hw: tuple[int, int]) -> NDArray[np.uint8]:
        """(T, H, W, 3), seconds from the first frame."""
        ...


class VideoFile:
    """A video in a file or in bytes."""

    def __init__(self, source: Source) -> None:
        self.source = source

    @cached_property
    def info(self) -> VideoInfo:
        try:
            return probe_video(self.source)
        except InvalidMedia as error:
            raise unreadable(self.source, "video", _cause(error)) from error

    def frames_at(self, times_s: Sequence[float], size_hw: tuple[int, int]) -> NDArray[np.uint8]:
        try:
            frames: NDArray[np.uint8] = decode_frames(
                self.source, times_s, info=self.info, size_hw=size_hw
            )
        except InvalidMedia as error:
            raise unreadable(self.source, "video", _cause(error)) from error
        return frames

    @cached_property
    def size_hw(self) -> tuple[int, int]:
        """Of the first frame, which is decoded: few rows ask."""
        try:
            height, width = decode_frames(self.source, [0.0], info=self.info).shape[1:3]
        except InvalidMedia as error:
            raise unreadable(self.source, "video", _cause(error)) from error
        return height, width


def _cause(error: Exception) -> Exception:
    return error.__cause__ if isinstance(error.__cause__, Exception) else error


def open_video(source: Any) -> Video:
    """A video of whatever a row holds: a path, bytes, a mapping of them, or a `Video`."""
    if isinstance(source, Mapping):
        source = source.get("bytes") or source.get("path")
    if isinstance(source, bytes | str | PathLike):
        return VideoFile(source)
    if not hasattr(source, "frames_at"):
        raise InvalidMedia(
            f"a video of type {type(source).__name__} is none: give a path, bytes or a `Video`"
        )
    video: Video = source
    return video


@dataclass(frozen=True)
class _Frame:
    """One frame of sampled ones: its shape; opened with the others."""

    frames: SampledFrames
    index: int

    @property
    def shape(self) -> tuple[int, int, int]:
        return (*self.frames.video.size_hw, 3)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[np.uint8]:
        times_s = [self.frames.file_times_s[self.index]]
        frame: NDArray[np.uint8] = self.frames.video.frames_at(times_s, self.frames.size_hw)[0]
        return frame


@dataclass(frozen=True, kw_only=True)
class SampledFrames(Sequence[Picture]):
    """Frames of a video by their times in its file; `np.asarray` opens all of them in one go.

    Their shapes are those of the video; opened they are of `size_hw`, so that never more than
    that of each frame is held.
    """

    video: Video
    file_times_s: Sequence[float]
    size_hw: tuple[int, int]

    def __len__(self) -> int:
        return len(self.file_times_s)

    @overload
    def __getitem__(self, index: int) -> Picture: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Picture]: ...
    def __getitem__(self, index: int | slice) -> Picture | Sequence[Picture]:
        if isinstance(index, slice):
            return [_Frame(self, k) for k in range(*index.indices(len(self)))]
        return _Frame(self, range(len(self))[index])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[np.uint8]:
        return self.video.frames_at(self.file_times_s, self.size_hw)
