"""From what the model wrote to grounding.

Knows: which media an answer is about, and how many places of it are wanted. Does not know: HTTP,
how the text was generated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from molmo_core import api
from molmo_core.api_grounding import observation
from molmo_core.points import Grounding, GroundingParser, GroundingWarning, Point
from molmo_core.points.grounding import Kind
from molmo_server.answers.confidence import TokenTrail
from molmo_server.media.gate import CheckedMedia

Tokens = Sequence[Mapping[str, Any]]
"""`logprobs.content` of a choice."""


class AnswerReader:
    """Reads one answer while it is written; `close` gives its grounding, also to `on_close`.

    `max_points`: of points so many are kept, of tracks so many tracks.
    """

    def __init__(
        self,
        media: CheckedMedia,
        on_close: Callable[[api.Grounding], None] | None = None,
        *,
        max_points: int | None = None,
    ) -> None:
        self._media = media
        self._described = media.described()
        self._on_close = on_close
        self._max_points = max_points
        is_video = media.video is not None
        self._parser = GroundingParser(
            media="video" if is_video else "image", n_media=1 if is_video else len(media.images)
        )
        self._trail: TokenTrail | None = None
        self._confidences: dict[tuple[int, int], float] = {}
        self._kept: dict[Kind, set[object]] = {"point": set(), "track": set()}
        self._read_until = -1
        self._unread: list[bytes] = []
        """Prose that has come since."""
        self.late: list[api.Observation] = []
        """Those that only the end of the text completed; `close` finds them."""

    @property
    def text(self) -> str:
        self._catch_up()
        return self._parser.text

    def feed(self, text: str, tokens: Tokens | None = None) -> list[api.Observation]:
        """The observations that `text` completes. With the text's `tokens` they have a
        confidence."""
        if tokens:
            self._trail = self._trail or TokenTrail()
            self._trail.feed(tokens)
        self._catch_up()
        completed = self._parser.feed(text)
        return self._observed(completed) if completed else []

    def feed_prose(self, text: bytes) -> list[api.Observation]:
        """As `feed`, for ASCII without a `<`: outside of tags it completes nothing, and is read
        together with what follows."""
        if self._unread or self._parser.is_in_prose:
            self._unread.append(text)
            return []
        return self.feed(text.decode())

    def _catch_up(self) -> None:
        if self._unread:
            prose, self._unread = b"".join(self._unread), []
            self._parser.feed(prose.decode())

    def close(self) -> api.Grounding:
        self._catch_up()
        read = self._parser.close()
        self.late = self._observed([p for p in read.observations if p.span[0] > self._read_until])
        if self._max_points is not None:
            read = _cut(read, self._max_points)
        if self._media.is_part:
            read = self._in_whole(read)
        video = self._media.video
        grounding = api.Grounding.from_grounding(
            read,
            media=self._described,
            video=video.info if video else None,
            frame_times_s=video.file_times_s if video else (),
            confidences=self._confidences,
        )
        if self._on_close is not None:
            self._on_close(grounding)
        return grounding

    def _in_whole(self, read: Grounding) -> Grounding:
        in_whole = self._media.in_whole
        tracks = [replace(t, points=tuple(map(in_whole, t.points))) for t in read.tracks]
        return replace(read, points=tuple(map(in_whole, read.points)), tracks=tuple(tracks))

    def _observed(self, points: Sequence[Point]) -> list[api.Observation]:
        video = self._media.video
        observed = []
        for point in points:
            self._read_until = max(self._read_until, point.span[0])
            if not self._is_wanted(point):
                continue
            confidence = self._trail.confidence(point) if self._trail else None
            if confidence is not None:
                self._confidences[point.span] = confidence
            observed.append(
                observation(
                    self._media.in_whole(point),
                    media=self._described,
                    video=video.info if video else None,
                    confidence=confidence,
                )
            )
        return observed

    def _is_wanted(self, point: Point) -> bool:
        """Whether it is one of the first so many points, or of so many tracks."""
        if self._max_points is None:
            return True
        kept = self._kept[point.kind]
        key = point.span if point.kind == "point" else point.id
        if key not in kept and len(kept) < self._max_points:
            kept.add(key)
        return key in kept


def _cut(read: Grounding, most: int) -> Grounding:
    """The first `most` points and tracks, with a warning when there are more."""
    if len(read.points) <= most and len(read.tracks) <= most:
        return read
    points, tracks = read.points[:most], read.tracks[:most]
    dropped = [p.span for p in read.points[most:]] + [
        point.span for track in read.tracks[most:] for point in track.points
    ]
    warning = GroundingWarning(
        code="over_max_points",
        message=f"{read.count} were pointed at, the first {most} are kept",
        span=(min(start for start, _ in dropped), max(end for _, end in dropped)),
    )
    return replace(
        read,
        points=points,
        tracks=tracks,
        count=len(points) + len(tracks),
        warnings=(*read.warnings, warning),
    )


def read_answer(text: str, media: CheckedMedia, tokens: Tokens | None = None) -> api.Grounding:
    reader = AnswerReader(media)
    reader.feed(text, tokens)
    return reader.close()
