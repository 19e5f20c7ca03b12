"""Academic questions about one picture or several: VQA, documents, charts, science, pairs.

Knows: the columns and files of each. Does not know: templates, sampling.
Source: spec of Molmo2's training, sections 8.2 and 8.3.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from molmo_training.data.formatting.row import Row
from molmo_training.data.rows import RowTable
from molmo_training.datasets.files import (
    Read,
    RecordRows,
    below,
    hub_steps,
    hub_table,
    json_table,
    listed,
    need,
    pictures_folder,
)
from molmo_training.datasets.registry import dataset
from molmo_training.datasets.tables import ChosenRows, MappedRows

_COCO = (
    "Unpack http://images.cocodataset.org/zips/{zips}.zip in {{root}}/torch_datasets/images/coco."
)
_COCO_2014 = _COCO.format(zips="{train2014,val2014,test2015}")
_COCO_2017 = _COCO.format(zips="{train2017,val2017,test2017}")

# --- tables of Ai2: one configuration a split, paths of pictures below torch_datasets -------------

_QUESTION = ("question", "answers", "answer", "options", "answer_idx", "explanation", "style")
_DIRECT = ("question", "answers", "answer", "style")


def _ai2_row(folder: Path, style: str, kept: Sequence[str], row: Row) -> Row:
    """A row whose questions may be branches."""
    image = row.get("image")
    media: dict[str, Any] = {"image": below(folder, image)} if isinstance(image, str) else {}
    several = row.get("images") if image is None else image
    if not media and several is not None:
        media = {"images": [below(folder, path) for path in several]}
    fields = {name: row[name] for name in kept if row.get(name) is not None}
    if row.get("message_list") is not None:
        fields["message_list"] = [
            {name: part[name] for name in kept if part.get(name) is not None}
            for part in listed(row["message_list"])
        ]
    return {"style": style, **fields, **media}


def _register_ai2(
    name: str,
    repo: str,
    pictures: str,
    steps: str,
    *,
    style: str | None = None,
    kept: Sequence[str] = _QUESTION,
    splits: tuple[str, ...] = ("train", "validation"),
    licence: str = "see the source",
    read: Read | None = None,
) -> None:
    @dataset(
        name=name,
        groups=("image_academic",),
        source=f"Hugging Face: {repo}",
        splits=splits,
        licence=licence,
        manual=f"{hub_steps(repo)} {steps}",
    )
    def _(root: Path, split: str) -> RowTable:
        folder = pictures_folder(root)
        table = hub_table(root, repo, "train", config=split, read=read)
        need(folder / pictures)
        return MappedRows(table, partial(_ai2_row, folder, style or name, kept))


_register_ai2(
    "coco_2014_vqa_multi",
    "allenai/molmo2-vqa2-2014",
    "images/coco",
    _COCO_2014,
    style="vqa2",
    splits=("train", "validation", "test"),
    licence="CC-BY-4.0",
)
_register_ai2("okvqa", "allenai/molmo2-okvqa", "images/coco", _COCO_2014)
_register_ai2("a_okvqa_da", "allenai/molmo2-a-ok-vqa", "images/coco", _COCO_2017, kept=_DIRECT)
_register_ai2("a_okvqa_mc", "allenai/molmo2-a-ok-vqa", "images/coco", _COCO_2017)
_register_ai2(
    "tally_qa",
    "allenai/molmo2-tally-qa",
    "images",
    f"{_COCO_2014} Unpack Visual Genome's pictures in {{root}}/torch_datasets/images/vg.",
    splits=("train", "test"),
)
_register_ai2(
    "text_vqa",
    "allenai/molmo2-text-vqa",
    "text_vqa",
    "Unpack https://dl.fbaipublicfiles.com/textvqa/images/{train_val_images,test_images}.zip in "
    "{root}/torch_datasets/text_vqa.",
    splits=("train", "validation", "test"),
    licence="CC-BY-4.0",
)


def _of_several(rows: RecordRows) -> RowTable:
    """Those of more than one picture."""
    images = rows.column("image").to_pylist()
    return ChosenRows(rows, [k for k, of_row in enumerate(images) if len(of_row) > 1])


for _set in ("nlvr2", "llava_665k_multi", "spot-the-diff"):
    _register_ai2(
        f"mantis_instruct_{_set}_multi_only",
        f"allenai/molmo2-mantis-instruct-{_set}",
        f"mantis-instruct/{_set}",
        f"Unpack {_set}/*_images.zip of TIGER-Lab/Mantis-Instruct in "
        f"{{root}}/torch_datasets/mantis-instruct/{_set}.",
        style="mantis_instruct_mc",
        splits=("train", "validation") if _set == "nlvr2" else ("train",),
        licence="Apache-2.0; pictures: each source its own",
        read=_of_several,
    )

# --- documents ------------------------------------------------------------------------------------


def _documents(style: str, folder: Path, picture: str, content: Any) -> list[Row]:
    return [
        {
            "style": style,
            "image": below(folder, question[picture]),
            "question": question["question"],
            "answers": question["answers"],
        }
        for question in content["data"]
        if question.get("answers")
    ]


def _register_documents(
    name: str, task: str, folder: str, files: dict[str, str], picture: str, images: str = ""
) -> None:
    @dataset(
        name=name,
        groups=("image_academic",),
        source=f"https://rrc.cvc.uab.es/?ch=17 ({task})",
        splits=tuple(files),
        licence="research; see the challenge's terms",
        manual=f"Register there, download {task}, and unpack it in {{root}}/torch_datasets/"
        f"{folder}: {', '.join(files.values())} and the pictures.",
    )
    def _(root: Path, split: str) -> RowTable:
        place = pictures_folder(root) / folder
        read = partial(_documents, name, place / images, picture)
        return json_table(place / files[split], read)


_register_documents(
    "doc_qa",
    "task 1",
    "docqa",
    {"train": "train_v1.0_withQT.json", "validation": "val_v1.0_withQT.json"},
    "image",
)
_register_documents(
    "info_qa",
    "task 3",
    "info_qa",
    {
        "train": "infographicsVQA_train_v1.0.json",
        "validation": "infographicsVQA_val_v1.0_withQT.json",
    },
    "image_local_name",
    "images",
)

# --- charts, science, code-made figures ----------------------------------------------------------

_N_HUMAN, _N_MACHINE = 7_398, 20_901
_CHART_WEIGHTS = {0: _N_MACHINE, 1: _N_HUMAN}
"""Questions by people (0) and by machine (1) count as much as each other in all."""


def _chart(is_weighted: bool, row: Row) -> Row:
    made: dict[str, Any] = {"image": row["image"], "style": "chart_qa"}
    made |= {"question": row["query"], "answers": list(row["label"])}
    if is_weighted:
        made["weight"] = 2 * _CHART_WEIGHTS[int(row["human_or_machine"])] / (_N_HUMAN + _N_MACHINE)
    return made


def _register_charts(name: str, *, is_weighted: bool) -> None:
    repo, files = "HuggingFaceM4/ChartQA", {"train": "train", "validation": "val", "test": "test"}

    @dataset(
        name=name,
        groups=("image_academic",),
        source=f"Hugging Face: {repo}",
        splits=tuple(files),
        licence="GPL-3.0",
        manual=hub_steps(repo),
    )
    def _(root: Path, split: str) -> RowTable:
        return MappedRows(hub_table(root, repo, files[split]), partial(_chart, is_weighted))


_register_charts("chart_qa", is_weighted=False)
_register_charts("chart_qa_weighted", is_weighted=True)


def _with_picture(rows: RecordRows) -> RowTable:
    """Rows with a picture, by its path alone: the pictures are not read."""
    paths = rows.column("image.path").to_pylist()
    return ChosenRows(rows, [k for k, path in enumerate(paths) if path])


def _science(row: Row) -> Row:
    hint = (row.get("hint") or "").strip()
    return {
        "image": row["image"],
        "style": "science_qa",
        "question": f"{hint}\n{row['question']}" if hint else row["question"],
        "options": list(row["choices"]),
        "answer_idx": int(row["answer"]),
    }


@dataset(
    name="science_qa_img",
    groups=("image_academic",),
    source="Hugging Face: derek-thomas/ScienceQA",
    splits=("train", "validation", "test"),
    licence="CC-BY-NC-SA-4.0",
    manual=hub_steps("derek-thomas/ScienceQA"),
)
def science_qa_img(root: Path, split: str) -> RowTable:
    """Those of ScienceQA that show a picture."""
    return MappedRows(
        hub_table(root, "derek-thomas/ScienceQA", split, read=_with_picture), _science
    )


def _code_made_points(row: Row) -> Row:
    parts = [
        {"question": question, "points": listed(points)}
        for question, points in zip(row["questions"], row["answer_points"], strict=True)
    ]
    scale = {"point_scale": 100, "clip_points": True}
    return {"image": row["image"], "style": "cosyn_point", **scale, "message_list": parts}


@dataset(
    name="cosyn_point",
    groups=("pixmo", "image_pointing", "pretrain"),
    source="Hugging Face: allenai/CoSyn-point",
    splits=("train", "validation"),
    licence="ODC-BY-1.0",
    manual=hub_steps("allenai/CoSyn-point"),
)
def cosyn_point(root: Path, split: str) -> RowTable:
    """Questions answered by points, in pictures that code made."""
    return MappedRows(hub_table(root, "allenai/CoSyn-point", split), _code_made_points)
