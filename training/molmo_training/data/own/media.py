"""The media of a row under examination: each opened as far as its header, with what is wrong.

Knows: how files that are cut off look at their end. Does not know: rows' questions, findings.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from molmo_core.errors import InvalidMedia
from molmo_training.data.example import Picture
from molmo_training.data.formatting.row import Row
from molmo_training.data.media import PictureFile, SampledFrames, VideoFile

MediaFault = tuple[Literal["media missing", "media corrupt"], str]
_TAIL_BYTES = 4096
_ENDS = ((b"\xff\xd8\xff", b"\xff\xd9"), (b"\x89PNG\r\n\x1a\n", b"IEND"))
"""How files begin, and what complete ones have near their end."""


@dataclass(frozen=True, kw_only=True)
class OpenedMedia:
    """The row with its media opened, so that headers are read once, and their faults."""

    row: Row
    pictures: tuple[Picture, ...] = ()
    """The images, or one frame that stands for all of a video: places are counted in them."""
    faults: tuple[MediaFault, ...] = ()


def opened_media(row: Row) -> OpenedMedia:
    """Reads headers of pictures and the packets of a video, no pixels unless a file looks cut."""
    if "video" in row:
        video = VideoFile(row["video"])
        faults = tuple(_faults(row["video"], video))
        frames = (
            () if faults else (SampledFrames(video=video, file_times_s=[0.0], size_hw=(1, 1))[0],)
        )
        return OpenedMedia(row={**row, "video": video}, pictures=frames, faults=faults)
    sources = [row["image"]] if "image" in row else list(row.get("images", ()))
    pictures = [PictureFile(source) for source in sources]
    faults = tuple(
        fault
        for source, picture in zip(sources, pictures, strict=True)
        for fault in _faults(source, picture)
    )
    opened = {"image": pictures[0]} if "image" in row else {"images": pictures} if pictures else {}
    return OpenedMedia(row={**row, **opened}, pictures=tuple(pictures), faults=faults)


def _faults(source: Path | bytes, opened: PictureFile | VideoFile) -> Iterator[MediaFault]:
    if isinstance(source, Path) and not source.is_file():  # opening a pipe would wait for ever
        there = "is no file" if source.exists() else "is not there"
        yield "media missing", f"{source} {there}: put the file where the row names it"
        return
    try:
        if isinstance(opened, VideoFile):
            _ = opened.info
            return
        _ = opened.shape
        if _looks_cut(source):
            np.asarray(opened)
    except InvalidMedia as error:
        yield "media corrupt", error.message


def _looks_cut(source: Path | bytes) -> bool:
    if isinstance(source, bytes):
        head, tail = source[:8], source[-_TAIL_BYTES:]
    else:
        head, tail = _ends_of(source)
    return any(head.startswith(begin) and end not in tail for begin, end in _ENDS)


def _ends_of(path: Path) -> tuple[bytes, bytes]:
    with path.open("rb") as file:
        head = file.read(8)
        n_bytes = file.seek(0, os.SEEK_END)
        file.seek(max(0, n_bytes - _TAIL_BYTES))
        return head, file.read()
