"""Datasets by name, as tables of rows.

registry        `@dataset`, names, splits, what is missing
tables, files   rows of rows; files of all kinds as rows
lengths         what had to be counted, kept
drawn, …        the sets themselves, by what they ask; importing one registers its names
commands        `molmo data list`
"""

from molmo_training.datasets import (
    academic_images,
    drawn,
    drawn_verbs,
    drawn_videos,
    pixmo,
    texts,
    tracking,
    video_points,
    videos,
)
from molmo_training.datasets.registry import (
    Dataset,
    all_datasets,
    data_folder,
    dataset,
    find_dataset,
    open_dataset,
    status_of,
)

__all__ = [
    "Dataset",
    "academic_images",
    "all_datasets",
    "data_folder",
    "dataset",
    "drawn",
    "drawn_verbs",
    "drawn_videos",
    "find_dataset",
    "open_dataset",
    "pixmo",
    "status_of",
    "texts",
    "tracking",
    "video_points",
    "videos",
]
