"""Tables of rows → examples whose size is known before their pixels are opened.

A row holds what `formatting` reads, and its media: `image`, `images` or `video` (a path, bytes, a
Pillow image, an array, or anything that `media` opens), of a video the part `clip_start_s` to
`clip_end_s`; all other times of a row count from the begin of that part. `objects` are marks for
each image, or a function from frame times to marks for each frame. Where a row leaves something
open it has `one_of`: a list of rows, of which one is drawn, by `rates` where it has them, and laid
over it; parts of `message_list` may have it too.
Knows: which media a row has and how many of them are seen. Does not know: datasets, batches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from molmo_core.errors import InvalidExample
from molmo_training.data.example import Example, MarkedObject, Tokenized
from molmo_training.data.formatting import Formatter, RowMedia
from molmo_training.data.formatting.formatter import questions_of
from molmo_training.data.formatting.row import Row, invalid, items, optional_number, rows
from molmo_training.data.formatting.tracks import rate_of
from molmo_training.data.media import SampledFrames, open_picture, open_video
from molmo_training.data.packing import Size
from molmo_training.data.sampling import (
    MediaSettings,
    annotated_frame_times,
    clip_of,
    frame_times,
)
from molmo_training.data.tokenize import Outline, Tokenizing


class RowTable(Protocol):
    """The rows of one split of a dataset; the same index is always the same row."""

    def __len__(self) -> int: ...

    def row(self, index: int) -> Row: ...


@dataclass(frozen=True, kw_only=True)
class PendingRow:
    """An example whose media wait to be opened."""

    example: Example
    outline: Outline
    tokenizing: Tokenizing

    @property
    def size(self) -> Size:
        return Size(len(self.outline.tree.input_ids), self.outline.n_crops)

    def row(self) -> Tokenized:
        return self.tokenizing.finish(self.example, self.outline)


@dataclass(frozen=True, kw_only=True)
class FormattedRows:
    """A table as a `RowSource`: the same generator always gives the same example."""

    table: RowTable
    formatter: Formatter
    tokenizing: Tokenizing
    media: MediaSettings = field(default_factory=MediaSettings)

    def __len__(self) -> int:
        return len(self.table)

    def make(self, index: int, rng: np.random.Generator) -> PendingRow:
        """Reads headers of media, no pixels. Raises InvalidExample, InvalidMedia."""
        example = self.example(index, rng)
        outline = self.tokenizing.outline(example)
        return PendingRow(example=example, outline=outline, tokenizing=self.tokenizing)

    def example(self, index: int, rng: np.random.Generator) -> Example:
        """The example with its media unopened."""
        return self.example_of(self.table.row(index), rng)

    def example_of(self, row: Row, rng: np.random.Generator) -> Example:
        """That of any row, unopened as well."""
        row = _first_images(resolved(row, rng), self.media.max_images)
        opened = self._opened(row, rng)
        return replace(
            self.formatter(row, rng, opened),
            objects=_objects(row, opened),
            max_crops=self._max_crops(len(opened.images), rng),
        )

    def _opened(self, row: Row, rng: np.random.Generator) -> RowMedia:
        named = [name for name in ("image", "images", "video") if row.get(name) is not None]
        if len(named) > 1:
            raise InvalidExample(f"a row has {' and '.join(named)}: give one of them")
        if named == ["video"]:
            return self._sampled(row, rng)
        pictures = [row["image"]] if named == ["image"] else []
        if named == ["images"]:
            pictures = list(items(row, "images"))
        return RowMedia(images=[open_picture(picture) for picture in pictures])

    def _sampled(self, row: Row, rng: np.random.Generator) -> RowMedia:
        video, geometry = open_video(row["video"]), self.tokenizing.videos
        begin_s, end_s = clip_of(
            video.info.duration_s,
            optional_number(row, "clip_start_s"),
            optional_number(row, "clip_end_s"),
        )
        max_frames = self.media.max_frames or geometry.max_frames
        fps = _annotated_fps(row)
        if fps is None:
            is_training = self.formatter.settings.is_training
            times_s = frame_times(
                end_s - begin_s, max_frames, self.media, rng, is_training=is_training
            )
        else:
            times_s = annotated_frame_times(
                end_s - begin_s, max_frames, annotated_fps=fps, source_fps=video.info.fps
            )
        frames = SampledFrames(
            video=video,
            file_times_s=[begin_s + time_s for time_s in times_s],
            size_hw=(geometry.crop_px, geometry.crop_px),
        )
        return RowMedia(frames=frames, frame_times_s=times_s)

    def _max_crops(self, n_images: int, rng: np.random.Generator) -> int | None:
        if n_images > 1:
            return self.media.max_multi_image_crops
        is_high_res = self.media.p_high_res > 0 and rng.random() < self.media.p_high_res
        return self.media.high_res_crops if n_images and is_high_res else None


def resolved(row: Row, rng: np.random.Generator) -> Row:
    """The row with what it leaves open drawn."""
    row = _one_of(row, rng)
    if row.get("message_list") is None:
        return row
    return {**row, "message_list": [_one_of(part, rng) for part in rows(row, "message_list")]}


def _one_of(row: Row, rng: np.random.Generator) -> Row:
    if row.get("one_of") is None:
        return row
    choices = rows(row, "one_of")
    rates = row.get("rates")
    if not choices or (rates is not None and len(rates) != len(choices)):
        raise invalid(row, "one_of", "at least one row, and as many rates if any")
    p = None if rates is None else np.asarray(rates, dtype=np.float64) / sum(rates)
    rest = {k: v for k, v in row.items() if k not in ("one_of", "rates")}
    return {**rest, **choices[int(rng.choice(len(choices), p=p))]}


def _first_images(row: Row, max_images: int | None) -> Row:
    """The row about its first images only, points of the others left out."""
    if max_images is None or row.get("images") is None:
        return row
    images = items(row, "images")
    if len(images) <= max_images:
        return row
    cut = {**_first_points(row, max_images), "images": images[:max_images]}
    if row.get("message_list") is not None:
        parts = rows(row, "message_list")
        cut["message_list"] = [_first_points(part, max_images) for part in parts]
    return cut


def _first_points(part: Row, n_images: int) -> dict[str, Any]:
    if not isinstance(part.get("points_by_label"), Mapping):
        return dict(part)
    by_label = part["points_by_label"]
    return {**part, "points_by_label": {k: items(by_label, k)[:n_images] for k in by_label}}


def _annotated_fps(row: Row) -> float | None:
    """The rate of the row's tracks; None for rows without any."""
    with_tracks = (one for one in questions_of(row) if one.get("tracks") is not None)
    tracked = next(with_tracks, None)
    return None if tracked is None else rate_of(tracked)


def _objects(row: Row, media: RowMedia) -> Sequence[Sequence[MarkedObject]]:
    marks = row.get("objects") or ()
    return marks(media.frame_times_s) if callable(marks) else marks
