"""Every row in docs/own-data.md is one: it is read, it has no finding, it makes an example."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from molmo_training.data.own.check import check_tables, mixture_of
from molmo_training.data.own.examine import FindingKind
from molmo_training.data.own.model_view import ModelView
from molmo_training.data.own.table import open_table
from tests.training.own.conftest import WriteRows

DOCUMENT = (Path(__file__).parents[3] / "docs" / "own-data.md").read_text(encoding="utf-8")
ROWS = [json.loads(block) for block in re.findall(r"```json\n(.*?)\n```", DOCUMENT, re.DOTALL)]
STYLES = [
    "pointing",
    "pointing",
    "point_count",
    "multi_image_point_then_count",
    "multi_image_pointing",
    "video_point",
    "video_point_track_per_frame",
    "user_qa",
    "vqa2",
    "a_okvqa_mc",
    "user_qa",
    "long_caption",
    "video_short_caption",
    "user_qa",
    "long_caption + pointing + user_qa",
    "user_qa",
    "pointing",
]


def test_the_rows_of_the_document(write_rows: WriteRows, view: ModelView) -> None:
    table = open_table(write_rows(*ROWS))
    report = check_tables([table], view, mixture=mixture_of([table]))
    assert report.files[0].findings == ()
    assert report.files[0].n_usable == len(ROWS)
    styles = {style.style: style.n_rows for style in report.files[0].styles}
    assert styles == {style: STYLES.count(style) for style in STYLES}


@pytest.mark.parametrize("kind", FindingKind.__args__)
def test_every_finding_is_in_the_document(kind: str) -> None:
    assert re.search(rf"^\| (?:[\w ]+, )?{kind}\b", DOCUMENT, re.MULTILINE)
