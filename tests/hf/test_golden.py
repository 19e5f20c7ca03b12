"""Processors against the specifications' vectors: tilings, token counts, pooling, frame times."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from molmo_core.images import (
    ImageGeometry,
    count_image_tokens,
    grid_of,
    image_pooling,
    select_tiling,
    tiling_of,
)
from molmo_core.tokens import IMAGE, VIDEO
from molmo_core.videos import (
    VideoGeometry,
    prepare_frames,
    sample_indices,
    sample_times,
    timestamp_text,
)
from tests.support.reference_values import reference_processor

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "geometry.json").read_text())
MARGIN_PX = 112
TILINGS = {"whole_view": (1, 1), "one_tile": (1, 1), "two_by_two_tiles": (2, 2)}


@pytest.fixture(scope="module")
def processor():
    return reference_processor()


@pytest.mark.parametrize("max_crops", [8, 24])
@pytest.mark.parametrize("case", GOLDEN["images"], ids=lambda case: str(case["size_hw"]))
def test_tilings_and_token_counts(case, max_crops):
    geometry, size_hw = ImageGeometry(max_crops=max_crops), tuple(case["size_hw"])
    expected = case[f"crops_{max_crops}"]
    rows, cols = tiling_of(size_hw, geometry)
    assert [rows, cols] == expected["tiling"]
    resized = [rows * geometry.window_px + MARGIN_PX, cols * geometry.window_px + MARGIN_PX]
    assert resized == expected.get("resized_px", resized)
    assert [*grid_of(size_hw, geometry)] == [14, 14, *expected["pooled"]]
    assert count_image_tokens(size_hw, geometry) == expected["tokens"]


@pytest.mark.parametrize("case", GOLDEN["images"][:8], ids=lambda case: str(case["size_hw"]))
def test_the_processor_writes_as_many_tokens(case, processor):
    inputs = processor(text=IMAGE, images=np.zeros((*case["size_hw"], 3), np.uint8))
    rows, cols = case["crops_8"]["tiling"]
    assert len(inputs["input_ids"][0]) == 1 + case["crops_8"]["tokens"]
    assert inputs["image_num_crops"].tolist() == [1 + rows * cols]
    assert inputs["pixel_values"].shape == (1 + rows * cols, 729, 588)
    assert inputs["image_grids"].tolist() == [[14, 14, *case["crops_8"]["pooled"]]]


@pytest.mark.parametrize("case", GOLDEN["most_tokens"], ids=lambda case: str(case["tiling"]))
def test_token_counts_of_the_largest_tilings(case):
    rows, cols = case["tiling"]
    size_hw = (rows * 266 + MARGIN_PX, cols * 266 + MARGIN_PX)
    geometry = ImageGeometry(max_crops=rows * cols)
    assert tiling_of(size_hw, geometry) == (rows, cols)
    assert count_image_tokens(size_hw, geometry) == case["tokens"]


def test_more_crops_for_one_call(processor):
    pixels = np.zeros((720, 1280, 3), np.uint8)
    inputs = processor(text=IMAGE, images=pixels, images_kwargs={"max_crops": 24})
    assert len(inputs["input_ids"][0]) == 1 + 1949
    assert processor.image_processor.max_crops == 8


def test_equal_tilings_prefer_fewer_crops():
    assert select_tiling(266, 266, 266, 8) == (1, 1)
    assert select_tiling(267, 266, 266, 8) == (2, 1)


@pytest.mark.parametrize("name", TILINGS)
def test_pooling_indices_of_images(name):
    pooling = image_pooling(*TILINGS[name], ImageGeometry())
    found = {row: pooling[int(row)].tolist() for row in GOLDEN["pooling"][name]}
    assert found == GOLDEN["pooling"][name]


@pytest.mark.parametrize("tiling", [(1, 1), (2, 2), (5, 1), (2, 4)])
def test_every_patch_of_the_tiled_view_is_pooled_once(tiling):
    rows, cols = tiling
    used = image_pooling(rows, cols, ImageGeometry())[196:]
    used = used[used >= 0]
    assert len(used) == len(set(used.tolist())) == (19 * rows + 8) * (19 * cols + 8)
    assert used.min() >= 729
    assert used.max() < 729 * (1 + rows * cols)


def test_pooling_indices_of_frames():
    prepared = prepare_frames(np.zeros((2, 30, 40, 3), np.uint8), VideoGeometry())
    expected = GOLDEN["pooling"]["frame"]
    assert {row: prepared.pooling[int(row)].tolist() for row in expected} == expected
    assert prepared.pooling.shape == (2 * 81, 9)


@pytest.mark.parametrize(
    "case", GOLDEN["times"], ids=lambda c: f"{c['mode']}-{c.get('sampling_fps')}-{c['duration_s']}"
)
def test_frame_times(case):
    geometry = VideoGeometry(
        max_frames=128, sample_mode=case["mode"], sampling_fps=case.get("sampling_fps", 2)
    )
    times = sample_times(case["duration_s"], geometry, source_fps=case.get("source_fps"))
    assert len(times) == case["n"]
    assert times[: len(case["first"])] == pytest.approx(case["first"], abs=5e-5)
    assert times[-len(case["last"]) :] == pytest.approx(case["last"], abs=5e-5)


@pytest.mark.parametrize("case", GOLDEN["indices"], ids=lambda c: f"{c['n_frames']}@{c['fps']}")
def test_index_sampling_as_stock_loaders_do_it(case):
    geometry = VideoGeometry(max_frames=case["max_frames"], max_fps=case["max_fps"])
    indices = sample_indices(case["n_frames"], case["fps"], geometry)
    assert " ".join(f"{i / case['fps']:.1f}" for i in indices) == case["timestamps"]


def test_low_rates_give_distinct_times():
    assert len(sample_times(7.0, VideoGeometry())) == 15


def test_the_processor_writes_a_frame_as_83_tokens_and_its_time(processor):
    frames = np.zeros((2, 20, 30, 3), np.uint8)
    inputs = processor(text=VIDEO, videos=[frames], video_metadata=[{"frame_times_s": [0, 10.25]}])
    frame = "<frame_start>" + "<im_patch>" * 81 + "<frame_end>"
    expected = processor.tokenizer.encode(f"<|im_end|>0.0 {frame} 10.2 {frame}")
    assert inputs["input_ids"] == [expected]
    assert timestamp_text(10.25, is_first=False) == " 10.2 ", "half to even, as Python formats"
    assert inputs["video_grids"].tolist() == [[2, 9, 9]]
