"""Questions about videos.

Knows: the files and columns of each. Does not know: templates, which frames are sampled.
Source: spec of Molmo2's training, section 8.5.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from molmo_core.errors import InvalidExample
from molmo_training.data.formatting.row import Row
from molmo_training.data.rows import RowTable
from molmo_training.datasets.files import (
    below,
    csv_table,
    json_table,
    need,
    read_json,
    videos_folder,
)
from molmo_training.datasets.registry import dataset
from molmo_training.datasets.tables import JoinedRows, LazyTable, MappedRows

# --- NExT-QA --------------------------------------------------------------------------------------


def _next_row(folder: Path, paths: Mapping[str, str], line: Mapping[str, str]) -> Row:
    return {
        "video": folder / "NExTVideo-all-videos" / f"{paths[line['video']]}.mp4",
        "style": "video_multiple_choice",
        "question": line["question"],
        "options": [line[f"a{k}"] for k in range(5)],
        "answer_idx": int(line["answer"]),
    }


def _next_table(folder: Path, file: Path) -> RowTable:
    paths = read_json(folder / "map_vid_vidorID.json")
    return csv_table(file, partial(_next_row, folder, paths))


@dataset(
    name="nextqa_mc",
    groups=("video_academic",),
    source="https://github.com/doc-doc/NExT-QA",
    splits=("train", "val"),
    licence="MIT; videos: VidOR's terms",
    manual="Put its {train,val}.csv and map_vid_vidorID.json into {root}/video_datasets/NeXTQA, "
    "and unpack its videos in {root}/video_datasets/NeXTQA/NExTVideo-all-videos.",
)
def nextqa_mc(root: Path, split: str) -> RowTable:
    """Multiple choice about causes and times."""
    folder = videos_folder(root) / "NeXTQA"
    need(folder / "map_vid_vidorID.json")
    need(folder / "NExTVideo-all-videos")
    file = need(folder / f"{split}.csv")
    return LazyTable(partial(_next_table, folder, file), counted=[file])


# --- Perception Test ------------------------------------------------------------------------------


def _perception_rows(videos: Path, content: Mapping[str, Any]) -> list[Row]:
    """A row of each video, its questions as branches."""
    return [
        {
            "video": videos / f"{name}.mp4",
            "style": "video_multiple_choice",
            "message_list": [
                {
                    "question": asked["question"],
                    "options": list(asked["options"]),
                    "answer_idx": int(asked["answer_id"]),
                }
                for asked in of_video["mc_question"]
            ],
        }
        for name, of_video in content.items()
        if of_video.get("mc_question")
    ]


_PERCEPTION_FILES = {
    "train": ("all_train.json", "train_videos"),
    "validation": ("mc_question_val/mc_question_valid.json", "videos"),
}


@dataset(
    name="perception_test",
    groups=("video_academic",),
    source="https://github.com/google-deepmind/perception_test",
    splits=tuple(_PERCEPTION_FILES),
    licence="CC-BY-4.0",
    manual="Unpack its train annotations and videos in {root}/video_datasets/perception_test as "
    "all_train.json and train_videos, those of validation as "
    "mc_question_val/mc_question_valid.json and videos.",
)
def perception_test(root: Path, split: str) -> RowTable:
    """Multiple choice about perception in filmed scenes."""
    folder = videos_folder(root) / "perception_test"
    file, videos = _PERCEPTION_FILES[split]
    return json_table(folder / file, partial(_perception_rows, need(folder / videos)))


# --- LLaVA-Video-178K -----------------------------------------------------------------------------

_ACADEMIC = ("academic", "activitynet", "perceptiontest", "nextqa")
_OPTION = re.compile(r"^\(?([A-Z])[.)]\s*(.*)$")
_LABEL = re.compile(r"\(?([A-Z])(?:[.):]|\s*$)")
_INSTRUCTION = re.compile(r"^(?:please|answer|respond|select|choose|provide)\b", re.IGNORECASE)


def parse_choice(question: str, answer: str) -> dict[str, Any]:
    """The question, its options and the right one, of lettered lines. Raises InvalidExample."""
    asked: list[str] = []
    options: list[str] = []
    for line in question.replace("<image>", "").strip().splitlines():
        option = _OPTION.match(line.strip())
        if option and option[1] == chr(ord("A") + len(options)):
            options.append(option[2].strip())
        elif line.strip() and not (options or _INSTRUCTION.match(line.strip())):
            asked.append(line.strip())
    label = _LABEL.match(answer.strip())
    index = ord(label[1]) - ord("A") if label else -1
    if not asked or not 0 <= index < len(options):
        raise InvalidExample(
            f"a question of {len(options)} options is answered {answer[:40]!r}: give lettered "
            "options, one a line, and the letter of one of them"
        )
    return {"question": "\n".join(asked), "options": options, "answer_idx": index}


def _llava_rows(folder: Path, kind: str, content: Sequence[Row]) -> list[Row]:
    rows: list[Row] = []
    for item in content:
        turns = [turn["value"] for turn in item["conversations"]]
        pairs = list(zip(turns[::2], turns[1::2], strict=False))
        video = below(folder, item["video"])
        rows.append({"video": video, "pairs": pairs, "kind": kind})
    return rows


def _llava_row(row: Row) -> Row:
    if row["kind"] == "mc":
        style, parts = "video_multiple_choice", [parse_choice(q, a) for q, a in row["pairs"]]
    else:
        style = "video_short_answer"
        parts = [
            {"question": q.replace("<image>", "").strip().splitlines()[0], "answer": a}
            for q, a in row["pairs"]
        ]
    return {"video": row["video"], "style": style, "message_list": parts}


def _register_llava(name: str, kind: str) -> None:
    repo = "lmms-lab/LLaVA-Video-178K"

    @dataset(
        name=name,
        groups=("video_academic",),
        source=f"Hugging Face: {repo}",
        splits=("train",),
        licence="Apache-2.0; videos: each source its own, for research",
        manual=f"Run: hf download {repo} --repo-type dataset --local-dir "
        "{root}/video_datasets/LLaVA-Video-178K; unpack the *.tar.gz of its academic, "
        "activitynetqa, perceptiontest and nextqa folders where they lie.",
    )
    def _(root: Path, split: str) -> RowTable:
        folder = need(videos_folder(root) / "LLaVA-Video-178K")
        found = sorted(folder.glob(f"*/*_{kind}_*qa_processed.json"))
        files = [file for file in found if any(part in file.parent.name for part in _ACADEMIC)]
        if not files:
            need(folder / f"0_30_s_academic_v0_1/0_30_s_academic_{kind}_v0_1_qa_processed.json")
        tables = [json_table(file, partial(_llava_rows, file.parent, kind)) for file in files]
        return MappedRows(JoinedRows(tables), _llava_row)


_register_llava("llava_video_mc_academic", "mc")
_register_llava("llava_video_oe_academic", "oe")
