"""Whatever stands in a row: it makes an example or is refused as one that cannot be used."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from molmo_core.errors import InvalidExample
from molmo_training.data.formatting import PRETRAIN, SFT, Formatter, RowMedia
from molmo_training.data.formatting.points import (
    IMAGE_POINT_GROUPS,
    MULTI_IMAGE_STYLES,
    VIDEO_POINT_STYLES,
)
from molmo_training.data.formatting.templates import template_groups
from molmo_training.data.formatting.tracks import TRACK_GROUPS

PICTURE = np.zeros((8, 8, 3), np.uint8)
MEDIA = st.sampled_from(
    [
        RowMedia(),
        RowMedia(images=[PICTURE] * 2),
        RowMedia(frames=[PICTURE] * 2, frame_times_s=[0.0, 0.5]),
    ]
)
STYLES = sorted(
    {
        *IMAGE_POINT_GROUPS,
        *MULTI_IMAGE_STYLES,
        *VIDEO_POINT_STYLES,
        *TRACK_GROUPS,
        *template_groups(),
        "vqa2",
        "cosyn_chart_exp",
    }
)
FIELDS = (
    "question prompt answers answer answer_annotations explanation text options answer_idx "
    "unlabelled_options label label_cased alt points points_by_label tracks sampling_fps object_id "
    "point_scale width height clip_points start_s end_s time_s unanswerable object subtitles "
    "messages guard_counting weight id x y"
).split()
ATOMS = (
    st.none()
    | st.booleans()
    | st.integers(-2, 9)
    | st.floats(-1, 9)
    | st.sampled_from(
        [float("nan"), float("inf"), 1e300, 10**400, "", "a", "<|POINT|>", "How many a?"]
    )
)


def rows_of(values: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.dictionaries(st.sampled_from(FIELDS), values, max_size=6)


VALUES = st.recursive(
    ATOMS, lambda inner: st.lists(inner, max_size=3) | rows_of(inner), max_leaves=6
)
POINTS = st.lists(st.tuples(ATOMS, ATOMS) | rows_of(ATOMS), max_size=3)
MOMENTS = st.lists(
    st.fixed_dictionaries({"time_s": st.floats(0, 1) | ATOMS, "points": POINTS}), max_size=2
)
ROWS = st.builds(
    lambda style, row, typical: {**row, **typical, "style": style},
    st.sampled_from(STYLES),
    rows_of(VALUES),
    st.fixed_dictionaries(
        {},
        optional={
            "label": st.just("a"),
            "points": POINTS | MOMENTS,
            "tracks": MOMENTS,
            "points_by_label": st.just({"a": [[(1, 2)], []]}),
            "point_scale": st.just(100),
        },
    ),
)


@settings(derandomize=True, max_examples=150, deadline=None)
@given(row=ROWS, media=MEDIA, tree=st.booleans(), stage=st.sampled_from([SFT, PRETRAIN]))
def test_it_makes_an_example_or_is_refused(
    row: dict[str, Any], media: RowMedia, tree: bool, stage: Any
) -> None:
    whole = {"message_list": [row, row]} if tree else row
    formatter = Formatter(settings=stage)
    try:
        example = formatter(whole, np.random.default_rng(0), media)
    except InvalidExample:
        return
    assert len(example.branches) == 1 + tree
    again = formatter(whole, np.random.default_rng(0), media)
    assert again.branches == example.branches
    assert all(isinstance(turn.text, str) for b in example.branches for turn in b.turns)
