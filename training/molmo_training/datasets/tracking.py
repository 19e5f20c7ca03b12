"""Objects followed through videos: all of them, their ends, or one that is pointed out.

Annotations are tables of Hugging Face, videos are mp4 at the rate of the annotations. Adding a set
is a line of `_SETS`.
Knows: names, folders and columns. Does not know: templates, which frames are sampled.
Source: spec of Molmo2's training, section 8.6.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import NamedTuple

from molmo_training.data.formatting.row import Row
from molmo_training.data.rows import RowTable
from molmo_training.datasets.files import (
    below,
    hub_steps,
    hub_table,
    need,
    saved_table,
    videos_folder,
)
from molmo_training.datasets.registry import MissingFiles, dataset
from molmo_training.datasets.tables import MappedRows

STYLES = {
    "track": "video_point_track_per_frame",
    "ground": "video_point_ground_start_end",
    "single_point_track": "video_single_point_track_per_frame",
}
_ALL = tuple(STYLES)


class _Set(NamedTuple):
    home: str
    """Its folder below video_datasets/video_track."""
    tasks: tuple[str, ...]
    repo: str
    source: str
    config: str | None = None
    """Of the repository that holds several sets."""
    videos: str = "{split}/videos"
    valid_split: str | None = None
    """The videos' folder of the validation split, where there is one."""


_SINGLE = "allenai/molmo2-single-object-track"
_SETS = {
    "mevis": _Set("MeViS", _ALL, "allenai/molmo2-mevis", "FudanCVL/MeViS", valid_split="valid_u"),
    "ref_yt_vos": _Set(
        "Ref-YT-VOS", ("track",), "allenai/molmo2-ref-yt-vos", "codalab 29139", valid_split="valid"
    ),
    "ref_davis17": _Set(
        "Ref-DAVIS17", ("track",), "allenai/molmo2-ref-davis17", "DAVIS 2017", valid_split="valid"
    ),
    "burst": _Set("TAO-Amodal", _ALL, "allenai/molmo2-burst", "chengyenhsieh/TAO-Amodal at 6 fps"),
    "lv_vis": _Set("LV-VIS", _ALL, "allenai/molmo2-lv-vis", "LV-VIS train.zip"),
    "yt_vis": _Set("YT-VIS", ("track",), "allenai/molmo2-yt-vis", "YouTube-VIS train.zip"),
    "vicas": _Set("ViCaS", _ALL, "allenai/molmo2-vicas", "kumuji/ViCaS at 6 fps"),
    "revos": _Set("ReVOS", _ALL, "allenai/molmo2-revos", "ReVOS JPEGImages.zip"),
    "moca": _Set("MoCA", ("track", "ground"), "allenai/molmo2-moca", "MoCA", videos="videos"),
    **{
        name: _Set(home, ("single_point_track",), _SINGLE, home, config)
        for name, home, config in (
            ("lvosv1", "LVOSv1", "lvosv1"),
            ("lvosv2", "LVOSv2", "lvosv2"),
            ("lasot", "LaSOT", "lasot"),
            ("uwcot", "UW-COT220", "uwcot"),
            ("webuot", "webuot", "webuot"),
            ("latot", "LaTOT", "latot"),
            ("tnl2k", "TNL2K", "tnl2k"),
            ("tnllt", "TNLLT", "tnnlt"),
            ("webuav", "WebUAV", "webuav"),
            ("got10k", "GOT-10k", "got10k"),
            ("vasttrack", "VastTrack", "vasttrack"),
            ("trackingnet", "TrackingNet", "trackingnet"),
        )
    },
}


def _track_row(videos: Path, style: str, row: Row) -> Row:
    return {
        "video": below(videos, f"{row['video']}.mp4"),
        "style": style,
        "label": row["expression"],
        "width": row["width"],
        "height": row["height"],
        "sampling_fps": row["sampling_fps"],
        "clip_points": True,
        "tracks": [
            {"time_s": moment["time"], "points": [_sighting(point) for point in moment["points"]]}
            for moment in row["frame_trajectories"]
        ],
    }


def _sighting(point: Row) -> Row:
    place = point["point"]
    x, y = (place["x"], place["y"]) if isinstance(place, dict) else place
    return {"id": point["id"], "x": x, "y": y, "occluded": bool(point["occluded"])}


def _open(name: str, task: str, root: Path, split: str) -> RowTable:
    """Of the annotations saved by dataset and task, else of the repository's own files."""
    found, folder = _SETS[name], videos_folder(root) / "video_track"
    of_split = found.valid_split or split if split == "validation" else split
    try:
        table = saved_table(folder / "tracking" / name / task, of_split)
    except MissingFiles:
        table = hub_table(root, found.repo, split, config=found.config)
    videos = need(folder / found.home / found.videos.format(split=of_split))
    return MappedRows(table, partial(_track_row, videos, STYLES[task]))


def _register(name: str, task: str) -> None:
    found = _SETS[name]
    splits = ("train", "validation") if found.valid_split else ("train",)

    dataset(
        name=f"{name}_{task}",
        groups=("tracking",),
        source=f"Hugging Face: {found.repo}; videos: {found.source}",
        splits=splits,
        licence="see the sources; videos often for research only",
        manual=f"{hub_steps(found.repo)} Write each video of {found.source} as mp4 at the rate of "
        "its annotations (column fps) to {root}/video_datasets/video_track/"
        f"{found.home}/{found.videos.format(split='SPLIT')}/NAME.mp4.",
    )(partial(_open, name, task))


for _name, _found in _SETS.items():
    for _task in _found.tasks:
        _register(_name, _task)
