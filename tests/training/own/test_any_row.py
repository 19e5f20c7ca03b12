"""Whatever stands in a file: it is usable or has findings, and no part of ours breaks on it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from molmo_training.data.own.examine import Examiner
from molmo_training.data.own.model_view import ModelView
from molmo_training.data.own.schema import MEDIA_FIELDS, ROW_FIELDS
from molmo_training.data.own.table import open_table

ATOMS = st.sampled_from(
    [None, True, -1, 0, 1, 3.5, float("nan"), 1e300, 10**400, "", "a", "a.png", "v.mp4", "pointing"]
)
NAMES = st.sampled_from([*ROW_FIELDS, "x", "y", "id", "time_s", "role", "content", "typo"])
VALUES = st.recursive(
    ATOMS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=8,
)
NUMBERS = st.sampled_from([0, 1, 3.5, 20, 39.9, 100, -1, float("nan"), 10**400])
XY = st.tuples(NUMBERS, NUMBERS) | st.fixed_dictionaries({"x": NUMBERS, "y": NUMBERS})
POINTS = st.lists(XY | VALUES, max_size=3)
MOMENTS = st.lists(
    st.fixed_dictionaries({"time_s": st.sampled_from([0, 0.5, 99, -1]), "points": POINTS}),
    max_size=2,
)
QUESTIONS = st.fixed_dictionaries(
    {"label": st.just("a")},
    optional={
        "points": POINTS | MOMENTS,
        "tracks": MOMENTS,
        "points_by_label": st.dictionaries(st.sampled_from("ab"), st.lists(POINTS, max_size=2)),
        "messages": st.lists(st.sampled_from(["a", "", "<|im_end|>"]), max_size=4),
        "point_scale": NUMBERS,
        "count": st.booleans(),
    },
)
MEDIA = st.sampled_from([{}, {"image": "a.png"}, {"images": ["a.png"] * 2}, {"video": "v.mp4"}])
ROWS = st.builds(
    lambda media, question, inner, other: {**other, **question, **inner, **media},
    MEDIA,
    QUESTIONS,
    st.fixed_dictionaries({}, optional={"message_list": st.lists(QUESTIONS, max_size=2)}),
    st.dictionaries(NAMES.filter(lambda name: name not in MEDIA_FIELDS), VALUES, max_size=1),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, clip: Path) -> Path:
    path = tmp_path_factory.mktemp("any")
    Image.new("RGB", (40, 30)).save(path / "a.png")
    (path / "v.mp4").write_bytes(clip.read_bytes())
    return path


@settings(
    derandomize=True,
    max_examples=200,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(row=ROWS)
def test_it_is_usable_or_has_findings(folder: Path, view: ModelView, row: dict[str, Any]) -> None:
    path = folder / "rows.jsonl"
    path.write_text(json.dumps(row))
    table = open_table(path)
    facts = Examiner(table=table, view=view)(0)
    assert facts.is_usable or facts.findings
    assert not [f for f in facts.findings if re.match(r"\w+(Error|Exception): ", f.message)]
    if not facts.is_usable:
        return
    view.tokenizing(view.rows(table).example(0, np.random.default_rng(0)))
