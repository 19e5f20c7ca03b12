"""From what the model wrote to grounding.

Knows: which media an answer is about. Does not know: HTTP, how the text was generated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from molmo_core import api
from molmo_core.points import Grounding, GroundingParser
from molmo_server.media.gate import CheckedMedia


class AnswerReader:
    """Reads one answer while it is written; `close` gives its grounding, also to `on_close`."""

    def __init__(
        self, media: CheckedMedia, on_close: Callable[[api.Grounding], None] | None = None
    ) -> None:
        self._media = media
        self._on_close = on_close
        is_video = media.video is not None
        self._parser = GroundingParser(
            media="video" if is_video else "image", n_media=1 if is_video else len(media.images)
        )

    def feed(self, text: str) -> None:
        self._parser.feed(text)

    def close(self) -> api.Grounding:
        video = self._media.video
        read = self._parser.close()
        if video is not None and video.start_s:
            read = self._in_file(read)
        grounding = api.Grounding.from_grounding(
            read,
            media=self._media.described(),
            video=video.info if video else None,
            frame_times_s=video.file_times_s if video else (),
        )
        if self._on_close is not None:
            self._on_close(grounding)
        return grounding

    def _in_file(self, read: Grounding) -> Grounding:
        in_whole = self._media.in_whole
        tracks = [replace(t, points=tuple(map(in_whole, t.points))) for t in read.tracks]
        return replace(read, points=tuple(map(in_whole, read.points)), tracks=tuple(tracks))


def read_answer(text: str, media: CheckedMedia) -> api.Grounding:
    reader = AnswerReader(media)
    reader.feed(text)
    return reader.close()
