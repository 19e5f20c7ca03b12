"""Each public set on small files in its real layout: one example in full, through to tokens."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from molmo_training.data.formatting import FormatSettings, Formatter
from molmo_training.data.rows import FormattedRows, PendingRow
from molmo_training.data.tokenize import Tokenizing
from molmo_training.datasets import open_dataset
from molmo_training.vocabulary import load_vocabulary

from . import layouts

PLAIN = FormatSettings(prompt_templates="none", p_multi_point_all_image=1.0)
OTHER = "/elsewhere/pixmo_images"


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is written, and what the first example then is: (question, answer) of each branch."""

    name: str
    write: Callable[[Path], None]
    branches: list[list[str]]
    n_rows: int = 1
    n_images: int = 0
    is_video: bool = False
    split: str = "train"


def in_ai2(repo: str, **fields: Any) -> Callable[[Path], None]:
    """A table of Ai2 with pictures below torch_datasets."""

    def write(root: Path) -> None:
        images = fields["image"]
        for path in [images] if isinstance(images, str) else images:
            layouts.picture(root / "torch_datasets" / path)
        rows = [fields]
        if not isinstance(images, str):
            rows.append({**fields, "image": images[:1]})
        layouts.hub(root, repo, rows, at="train/train")

    return write


def in_pixmo(folder: str, **fields: Any) -> Callable[[Path], None]:
    names = [fields["image"]] if "image" in fields else fields["images"]
    return lambda root: layouts.pixmo(root, folder, [fields], *(Path(n).name for n in names))


def documents(root: Path) -> None:
    asked = {"image": "documents/a.png", "question": "Who?", "answers": ["Ann", "Ann", "A."]}
    layouts.written_json(
        root / "torch_datasets/docqa/train_v1.0_withQT.json",
        {"dataset_name": "SP-DocVQA", "data": [{"questionId": 1, **asked}]},
    )
    layouts.picture(root / "torch_datasets/docqa/documents/a.png")


def charts(root: Path) -> None:
    image = {"bytes": layouts.picture_bytes(), "path": None}
    asked = {"image": image, "query": "How much?", "label": ["14"], "human_or_machine": 0}
    layouts.hub(root, "HuggingFaceM4/ChartQA", [asked, {**asked, "human_or_machine": 1}])


def science(root: Path) -> None:
    image = {"bytes": layouts.picture_bytes(), "path": "image.png"}
    asked = {"question": "Which?", "choices": ["one", "two"], "answer": 1, "hint": "Look."}
    rows = [{"image": None, **asked}, {"image": image, **asked}]
    layouts.hub(root, "derek-thomas/ScienceQA", rows)


def code_made(root: Path) -> None:
    image = {"bytes": layouts.picture_bytes(), "path": None}
    points = [{"x": [50.0, 10.0], "y": [20.0, 100.0]}]
    row = {"image": image, "questions": ["The peaks"], "answer_points": points, "names": ["peak"]}
    layouts.hub(root, "allenai/CoSyn-point", [row])


def conversations(root: Path) -> None:
    kept = {
        "category": "other",
        "source": "some/set",
        "first_message_qwen3_tokens": 12,
        "empty_messages": False,
        "has_special_token": False,
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": "Hi"},
        ],
    }
    left_out = [
        {**kept, "category": "code"},
        {**kept, "source": "allenai/hardcoded-olmo"},
        {**kept, "first_message_qwen3_tokens": 5000},
        {**kept, "has_special_token": True},
    ]
    layouts.hub(root, "allenai/molmo2-tulu4-classified", [*left_out, kept])


def next_qa(root: Path) -> None:
    folder = root / "video_datasets" / "NeXTQA"
    line = {"video": "42", "question": "why did it move", "answer": 1}
    layouts.written_csv(
        folder / "train.csv", [{**line, "type": "CW", **{f"a{k}": f"option {k}" for k in range(5)}}]
    )
    layouts.written_json(folder / "map_vid_vidorID.json", {"42": "1164/4010069381"})
    layouts.video(folder / "NExTVideo-all-videos" / "1164" / "4010069381.mp4")


def perception(root: Path) -> None:
    folder = root / "video_datasets" / "perception_test"
    asked = {"id": 0, "question": "What?", "options": ["a", "b", "c"], "answer_id": 2}
    annotated = {"video_1": {"metadata": {}, "mc_question": [asked]}, "video_2": {"metadata": {}}}
    layouts.written_json(folder / "all_train.json", annotated)
    layouts.video(folder / "train_videos" / "video_1.mp4")


def llava(root: Path) -> None:
    folder = root / "video_datasets/LLaVA-Video-178K/0_30_s_academic_v0_1"
    question = "<image>\nWhat falls?\nA. a cup\nB. a ball\nPlease respond with only the letter."
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "B."}]
    item = {"id": "x", "conversations": turns, "video": "academic_source/x.mp4"}
    layouts.written_json(folder / "0_30_s_academic_mc_v0_1_qa_processed.json", [item])
    layouts.written_json(
        folder.parent / "1_2_m_youtube_v0_1" / "1_2_m_youtube_mc_v0_1_qa_processed.json", [item] * 9
    )
    layouts.video(folder / "academic_source" / "x.mp4")


def video_points(root: Path) -> None:
    row = {
        "video_id": "abc",
        "video_source": "youtube",
        "label": "dog",
        "question": "Point to the dog",
        "count": 2,
        "two_fps_timestamps": [0.5, 1.5],
        "points": [[{"x": 50.0, "y": 50.0}], [{"x": 20.0, "y": 10.0}]],
        "clip_start": 0.5,
        "clip_end": 2.0,
        "video_duration": 2.0,
    }
    many = {**row, "label": "ants", "count": 30}
    gone = {**row, "video_id": "gone"}
    kinds = "action_or_event animal anomaly comparative_reference indirect_reference object"
    for kind in [*kinds.split(), "referring_expression", "spatial_reference"]:
        rows = [row, many, gone] if kind == "object" else [many]
        layouts.hub(root, "allenai/Molmo2-VideoPoint", rows, at=f"{kind}/train")
    layouts.video(root / "video_datasets/youtube-cc/youtube-cc-kw-2fps/abc_2fps.mp4")


def tracks(task: str) -> Callable[[Path], None]:
    def write(root: Path) -> None:
        folder = root / "video_datasets" / "video_track"
        moments = [
            {
                "frame": k,
                "time": k * 0.5,
                "points": [
                    {"id": 7, "point": [10.0 * k, 50.0], "occluded": k == 1},
                    {"id": 3, "point": [90.0, 50.0], "occluded": False},
                ],
            }
            for k in range(3)
        ]
        row = {
            "id": "1",
            "video": "clip",
            "expression": "the star",
            "fps": 6.0,
            "sampling_fps": 2,
            "width": 100,
            "height": 100,
            "frame_trajectories": moments,
        }
        layouts.saved(folder / "tracking" / "mevis" / task, {"train": [row]})
        layouts.video(folder / "MeViS" / "train" / "videos" / "clip.mp4")

    return write


COUNTED = 'Counting the <points coords="{}">cat</points> shows a total of 1.'
DOGS = '<points coords="0.0 1 500 500;1.0 2 200 100">dog</points>'
ENDS = '<tracks coords="0.0 1 000 500 2 900 500;1.0 1 200 500 2 900 500">the star</tracks>'
CASES = [
    Case(
        name="pixmo_cap_with_transcripts",
        write=in_pixmo(
            "cap", image=f"{OTHER}/a1", caption="A cat.", transcripts=["there is a cat"]
        ),
        branches=[["", "A cat."], ["transcript:", "there is a cat"]],
        n_images=1,
    ),
    Case(
        name="pixmo_points_train",
        write=in_pixmo(
            "points-pointing",
            image=f"{OTHER}/a1",
            label=["Cat", "grass", "leaf"],
            points=[
                [{"x": 50.0, "y": 20.0}],
                [{"x": 1.0 + k, "y": 2.0} for k in range(59)] + [{"x": 99.0, "y": 2.0}],
                [{"x": 3.0, "y": 3.0}] * 61,
            ],
        ),
        branches=[["cat", COUNTED.format("1 1 500 200")]],
        n_rows=4,
        n_images=1,
    ),
    Case(
        name="pixmo_count_train",
        write=in_pixmo(
            "count", image=f"{OTHER}/a1", label="cat", points=[{"x": 30.0, "y": 15.0}], count=1
        ),
        branches=[["cat", COUNTED.format("1 1 500 500")]],
        n_rows=2,
        n_images=1,
    ),
    Case(
        name="pixmo_multi_points",
        write=in_pixmo(
            "pixmo-multi-points",
            images=[f"{OTHER}/a1", f"{OTHER}/a2"],
            labels=[["Cat"], ["Cat"]],
            points=[[[{"x": 1.0, "y": 2.0}]], [[{"x": 30.0, "y": 40.0}]]],
        ),
        branches=[["cat", '<points coords="1 1 010 020;2 2 300 400">cat</points>']],
        n_images=2,
    ),
    Case(
        name="pixmo_ask_model_anything",
        write=in_pixmo(
            "ask-model-anything", image=f"{OTHER}/a1", question="Where is it?", answer="Here."
        ),
        branches=[["Where is it?", "Here."]],
        n_images=1,
    ),
    Case(
        name="pixmo_cap_qa_as_user_qa",
        write=in_pixmo(
            "cap-qa",
            image=f"{OTHER}/a1",
            question="[USER] What? [ASSISTANT] A cat. [USER] Its colour? [ASSISTANT]",
            answer="Black.",
        ),
        branches=[["What?", "A cat.", "Its colour?", "Black."]],
        n_images=1,
    ),
    Case(
        name="pixmo_multi_image_qa_multi_only_max5",
        write=in_pixmo(
            "pixmo-multi-image-qa",
            images=[f"{OTHER}/a1", f"{OTHER}/a2"],
            qa_pairs={"question": ["Same?"], "answer": ["No."]},
        ),
        branches=[["Same?", "No."]],
        n_images=2,
    ),
    Case(
        name="coco_2014_vqa_multi",
        write=in_ai2(
            "allenai/molmo2-vqa2-2014",
            image="images/coco/train2014/a.jpg",
            message_list=[{"question": "What?", "answers": ["cat", "cat", "dog"]}],
        ),
        branches=[["vqa2: What?", "cat"]],
        n_images=1,
    ),
    Case(
        name="text_vqa",
        write=in_ai2(
            "allenai/molmo2-text-vqa",
            image="text_vqa/train_images/a.jpg",
            question="What is written?",
            answers=["stop"],
        ),
        branches=[["text_vqa: What is written?", "stop"]],
        n_images=1,
    ),
    Case(
        name="mantis_instruct_nlvr2_multi_only",
        write=in_ai2(
            "allenai/molmo2-mantis-instruct-nlvr2",
            image=["mantis-instruct/nlvr2/train_images/a.jpg"] * 2,
            question="Two dogs?",
            options=["yes", "no"],
            answer_idx=0,
        ),
        branches=[["Two dogs?\nA. yes\nB. no", "A. yes"]],
        n_images=2,
    ),
    Case(name="doc_qa", write=documents, branches=[["doc_qa: Who?", "Ann"]], n_images=1),
    Case(
        name="chart_qa_weighted",
        write=charts,
        branches=[["chart_qa: How much?", "14"]],
        n_rows=2,
        n_images=1,
    ),
    Case(
        name="science_qa_img",
        write=science,
        branches=[["Look.\nWhich?\nA. one\nB. two", "B. two"]],
        n_images=1,
    ),
    Case(
        name="cosyn_point",
        write=code_made,
        branches=[["The peaks", '<points coords="1 1 100 1000 2 500 200">The peaks</points>']],
        n_images=1,
    ),
    Case(name="tulu4", write=conversations, branches=[["Be brief.\nHello", "Hi"]]),
    Case(
        name="nextqa_mc",
        write=next_qa,
        branches=[
            [
                "why did it move\n" + "\n".join(f"{c}. option {k}" for k, c in enumerate("ABCDE")),
                "B. option 1",
            ]
        ],
        is_video=True,
    ),
    Case(
        name="perception_test",
        write=perception,
        branches=[["What?\nA. a\nB. b\nC. c", "C. c"]],
        is_video=True,
    ),
    Case(
        name="llava_video_mc_academic",
        write=llava,
        branches=[["What falls?\nA. a cup\nB. a ball", "B. a ball"]],
        is_video=True,
    ),
    Case(
        name="vixmo_points_minmax_0_5",
        write=video_points,
        branches=[["dog", f"Counting the {DOGS} shows a total of 2."]],
        is_video=True,
    ),
    Case(
        name="mevis_track",
        write=tracks("track"),
        branches=[
            [
                "the star",
                '<tracks coords="0.0 1 000 500 2 900 500;0.5 2 900 500;1.0 1 200 500 2 900 500">'
                "the star</tracks>",
            ]
        ],
        is_video=True,
    ),
    Case(
        name="mevis_ground",
        write=tracks("ground"),
        branches=[["video_point_ground_start_end: the star", ENDS]],
        is_video=True,
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_first_example_is_what_the_files_say(
    case: Case, tmp_path: Path, tokenizing: Tokenizing
) -> None:
    case.write(tmp_path)
    table = open_dataset(case.name, tmp_path, case.split)
    assert len(table) == case.n_rows
    in_a_worker = pickle.loads(pickle.dumps(table))
    assert str(in_a_worker.row(0)) == str(table.row(0))
    rows = FormattedRows(table=table, formatter=Formatter(settings=PLAIN), tokenizing=tokenizing)
    pending = rows.make(0, np.random.default_rng(1))
    assert isinstance(pending, PendingRow)
    example = pending.example
    texts = sorted([turn.text for turn in branch.turns] for branch in example.branches)
    assert texts == sorted(case.branches)
    assert len(example.images) == case.n_images
    assert bool(len(example.frames)) == case.is_video
    tokenized = pending.row()
    assert (len(tokenized.input_ids), len(tokenized.crops)) == pending.size
    spelt = load_vocabulary().tokenizer.decode(tokenized.input_ids, skip_special_tokens=False)
    for question, answer, *_ in case.branches:
        asked = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{answer}"
        assert asked in spelt
    learnt = tokenized.targets[tokenized.weights > 0].tolist()
    answers = [turn.text for branch in example.branches for turn in branch.turns[1::2]]
    assert len(learnt) == sum(len(tokenizing.encode(answer)) + 1 for answer in answers)
