"""Points at moments of videos: Molmo2-VideoPoint, by how many points a label has.

Knows: its columns, where the copies at two frames a second lie. Does not know: templates.
Source: spec of Molmo2's training, section 8.4.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from molmo_training.data.formatting.row import Row
from molmo_training.data.rows import RowTable
from molmo_training.datasets.files import (
    RecordRows,
    hub_steps,
    hub_table,
    listed,
    need,
    videos_folder,
)
from molmo_training.datasets.registry import dataset
from molmo_training.datasets.tables import JoinedRows

logger = logging.getLogger(__name__)

_POINT_REPO = "allenai/Molmo2-VideoPoint"
_POINT_KINDS = (
    "action_or_event",
    "animal",
    "anomaly",
    "comparative_reference",
    "indirect_reference",
    "object",
    "referring_expression",
    "spatial_reference",
)
MOST_CLIP_S = 63.0
_P_CONVERSATION = 0.2
"""How often several labels of a clip are asked in turn instead of one by one."""


_VIDEO_COPIES = (
    ("youtube-cc/youtube-cc-*-2fps", "_2fps"),
    ("MammalNet/trimmed_video-2fps", "_2fps"),
    ("generated_videos/*-2fps", ""),
)
"""Folders of the copies at two frames a second, and how a video's name ends there."""


def _folders_here(folder: Path) -> list[tuple[Path, str]]:
    """Folders of copies, and how a video's name ends there."""
    return [
        (place, ending)
        for pattern, ending in _VIDEO_COPIES
        for place in sorted(folder.glob(pattern))
    ]


def _videos_here(folder: Path) -> dict[str, Path]:
    """The copies by the id of their video."""
    return {
        path.stem.removesuffix(ending): path
        for place, ending in _folders_here(folder)
        for path in sorted(place.glob("*.mp4"))
    }


def _clips(folder: Path, fewest: int, most: int, rows: RecordRows) -> RowTable:
    """The clips with labels of `fewest` to `most` points, each with the numbers of its rows."""
    names = ("video_id", "clip_start", "clip_end", "video_duration", "count")
    columns = [rows.column(name).to_pylist() for name in names]
    clips: dict[tuple[str, float, float], list[int]] = {}
    for number, (video, start_s, end_s, duration_s, count) in enumerate(zip(*columns, strict=True)):
        start_s, end_s = start_s or 0.0, end_s or duration_s
        if fewest <= (count or 0) <= most and end_s - start_s <= MOST_CLIP_S:
            clips.setdefault((video, start_s, end_s), []).append(number)
    videos = _videos_here(folder)
    here = {clip: numbers for clip, numbers in clips.items() if clip[0] in videos}
    if len(here) < len(clips):
        gone = len(clips) - len(here)
        logger.warning("%d of %d clips have no video in %s", gone, len(clips), folder)
    return _ClipRows(rows, [(videos[clip[0]], clip, numbers) for clip, numbers in here.items()])


@dataclass(frozen=True)
class _ClipRows:
    """Rows of labels by the clip that they are about."""

    rows: RecordRows
    clips: Sequence[tuple[Path, tuple[str, float, float], Sequence[int]]]

    def __len__(self) -> int:
        return len(self.clips)

    def row(self, index: int) -> Row:
        video, (_, start_s, end_s), numbers = self.clips[index]
        return {
            "video": video,
            "clip_start_s": start_s,
            "clip_end_s": end_s,
            "point_scale": 100,
            "clip_points": True,
            **asked_of_clip([self.rows.row(number) for number in numbers], start_s),
        }


def asked_of_clip(labels: Sequence[Row], start_s: float) -> Row:
    """Each label to be counted or pointed at, sometimes all of them in turn; times from the
    clip's begin."""
    asked: list[Row] = []
    for row in labels:
        moments = zip(row["two_fps_timestamps"] or (), row["points"] or (), strict=True)
        points = [{"time_s": time_s - start_s, "points": listed(xys)} for time_s, xys in moments]
        asked.append({"label": row["label"], "points": points})
    styles = [{"style": "video_point_count"}, {"style": "video_point"}]
    branches = {"message_list": [{**part, "one_of": styles} for part in asked]}
    if len(asked) == 1:
        return branches
    turns = [{**part, **styles[k % 2]} for k, part in enumerate(asked)]
    conversation = {"message_list": [{"multi_turn_messages": turns}]}
    return {
        "one_of": [conversation, branches],
        "rates": [_P_CONVERSATION, 1 - _P_CONVERSATION],
    }


def _register_points(fewest: int, most: int) -> None:
    @dataset(
        name=f"vixmo_points_minmax_{fewest}_{most}",
        groups=("video_pointing",),
        source=f"Hugging Face: {_POINT_REPO}",
        splits=("train",),
        licence="ODC-BY-1.0; videos: each its own",
        manual=f"{hub_steps(_POINT_REPO)} Fetch the videos that it names and write each at two "
        "frames a second to {root}/video_datasets: youtube-cc/youtube-cc-*-2fps/ID_2fps.mp4, "
        "MammalNet/trimmed_video-2fps/ID_2fps.mp4, generated_videos/SOURCE-2fps/ID.mp4.",
    )
    def _(root: Path, split: str) -> RowTable:
        folder = videos_folder(root)
        copies = [place for place, _ in _folders_here(folder)]
        if not copies:
            need(folder / "youtube-cc" / "youtube-cc-kw-2fps")
        read = partial(_clips, folder, fewest, most)
        return JoinedRows(
            [
                hub_table(root, _POINT_REPO, split, config=kind, read=read, beside=copies)
                for kind in _POINT_KINDS
            ]
        )


for _fewest, _most in ((0, 5), (6, 25), (26, 60)):
    _register_points(_fewest, _most)
