"""Text to points and tracks, while the text is still being written.

Knows: labels, tracks over tags, the sentences around tags. Does not know: how a tag is read
(scanner, coords), older formats (legacy), pixels.
Source: the reference's grammar and edge cases, evaluation specification, section 3.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from molmo_core.points.coords import MediaBounds
from molmo_core.points.grounding import (
    Grounding,
    GroundingWarning,
    Media,
    Point,
    Track,
    decode_text,
)
from molmo_core.points.legacy import find_legacy_points
from molmo_core.points.scanner import ScannedTag, TagScanner

_TAG_PLACE = "\x00"  # stands for each tag when the sentences are read
_COUNT = r"(?<![0-9.,-])([0-9]{1,9})(?![0-9]|[.,][0-9])"
_COUNTED_TAG = re.compile(
    rf"{_TAG_PLACE} shows a total of {_COUNT}|there are {_COUNT} {_TAG_PLACE}", re.IGNORECASE
)
_COUNT_SENTENCE = re.compile(
    rf"{_COUNT}\.?\Z|there are {_COUNT} "
    rf"|counting the [^\n{_TAG_PLACE}]{{1,300}} shows a total of {_COUNT}",
    re.IGNORECASE,
)
_EXPLICIT_NONE = re.compile(r"(?:there are none|no tracks available)(?:\.|\Z)", re.IGNORECASE)


class GroundingParser:
    """Feed an answer in any chunks: the chunks never change the result.

    `n_media` is the number of images in the prompt. `legacy` also reads the formats of older
    models when the text has no tag of the current one; those appear only in `close`.
    No text raises. Work and memory are linear in the text.
    """

    def __init__(self, *, media: Media = "image", n_media: int = 1, legacy: bool = False) -> None:
        if n_media < 0:
            raise ValueError(f"n_media is {n_media}: give the number of images, from 0")
        self._media = media
        self._legacy = legacy
        self._scanner = TagScanner(MediaBounds(media=media, n_media=n_media))
        self._chunks: list[str] = []
        self._result: Grounding | None = None

    def feed(self, text: str) -> list[Point]:
        """Return the observations that `text` completes, without label and alt.

        Raises RuntimeError after `close`.
        """
        if self._result is not None:
            raise RuntimeError("this parser is closed: use a new GroundingParser for each answer")
        self._chunks.append(text)
        return self._scanner.feed(text)

    @property
    def is_in_prose(self) -> bool:
        """Between tags, or in a label: without a `<` no text completes anything here."""
        return self._scanner.is_in_prose

    def close(self) -> Grounding:
        """Return everything, with labels. An observation that a cut text ends with appears here
        for the first time. Calling again returns the same."""
        if self._result is None:
            self._scanner.finish()
            self._result = self._assemble(self.text)
        return self._result

    @property
    def text(self) -> str:
        """All that was fed."""
        if len(self._chunks) > 1:
            self._chunks = ["".join(self._chunks)]
        return "".join(self._chunks)

    def _assemble(self, text: str) -> Grounding:
        tags = self._scanner.tags
        warnings = list(self._scanner.warnings)
        labelled = [point for tag in tags for point in _with_label(tag, text)]
        if self._legacy and not labelled:
            labelled, legacy_warnings = find_legacy_points(text, media=self._media)
            if labelled:  # what the current grammar says about an older tag no longer matters
                warnings = [warning for warning in warnings if warning.code != "malformed_tag"]
            warnings += legacy_warnings
        points = tuple(point for point in labelled if point.kind == "point")
        tracks, repeated = _group_tracks([point for point in labelled if point.kind == "track"])
        warnings += repeated
        count = len(points) + len(tracks)
        prose = _without_tags(text, tags).strip()
        is_explicit_none = not labelled and _EXPLICIT_NONE.match(prose) is not None
        declared_count = 0 if is_explicit_none else _declared_count(prose)
        if tags and declared_count is not None and declared_count != count:
            message = f"the sentence says {declared_count}, the tags hold {count}"
            span = (tags[0].start, tags[-1].end)
            warnings.append(GroundingWarning(code="count_mismatch", message=message, span=span))
        return Grounding(
            points=points,
            tracks=tracks,
            count=count,
            declared_count=declared_count,
            is_explicit_none=is_explicit_none,
            warnings=tuple(sorted(warnings, key=lambda warning: warning.span)),
        )


def parse_grounding(
    text: str, *, media: Media = "image", n_media: int = 1, legacy: bool = False
) -> Grounding:
    """Parse a whole answer; see `GroundingParser`."""
    parser = GroundingParser(media=media, n_media=n_media, legacy=legacy)
    parser.feed(text)
    return parser.close()


def _with_label(tag: ScannedTag, text: str) -> list[Point]:
    label = None
    if tag.label_span is not None:
        label = text[slice(*tag.label_span)]
        if not tag.is_closed:  # nobody knows where it ends: at the end of the line at the latest
            label = label.partition("\n")[0].strip() or None
    alt = None if tag.alt_span is None else decode_text(text[slice(*tag.alt_span)])
    label = None if label is None else decode_text(label)
    return [replace(point, label=label, alt=alt) for point in tag.points]


def _group_tracks(
    observations: Sequence[Point],
) -> tuple[tuple[Track, ...], list[GroundingWarning]]:
    """One track per label and id, also over several tags; the first sighting of a moment counts."""
    sightings: dict[tuple[str | None, int], dict[tuple[float, int], Point]] = {}
    warnings = []
    for point in observations:
        moments = sightings.setdefault((point.label, point.id), {})
        moment = (point.time_s or 0.0, point.media_index)
        if moment in moments:
            message = f"object {point.id} stands in two tags at one moment; the first is kept"
            warnings.append(GroundingWarning(code="duplicate_id", message=message, span=point.span))
        moments.setdefault(moment, point)
    tracks = tuple(
        Track(id=object_id, label=label, points=tuple(moments[at] for at in sorted(moments)))
        for (label, object_id), moments in sightings.items()
    )
    return tracks, warnings


def _without_tags(text: str, tags: Sequence[ScannedTag]) -> str:
    parts, end = [], 0
    for tag in tags:
        parts += [text[end : tag.start], _TAG_PLACE]
        end = tag.end
    return "".join([*parts, text[end:]])


def _declared_count(prose: str) -> int | None:
    """The number that the trained sentences state; summed when each of several tags has its own."""
    if _TAG_PLACE in prose:
        counted = [_first_group(match) for match in _COUNTED_TAG.finditer(prose)]
        if counted:
            return sum(counted)
    sentence = _COUNT_SENTENCE.match(prose)
    return None if sentence is None else _first_group(sentence)


def _first_group(match: re.Match[str]) -> int:
    return next(int(group) for group in match.groups() if group is not None)
