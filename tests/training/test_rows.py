"""Rows with media that wait: sizes without pixels, the same example of the same generator."""

from __future__ import annotations

import io
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from molmo_core.clips import sample_clip, write_clip
from molmo_core.errors import InvalidExample, InvalidMedia
from molmo_hf.image_processing_molmo2 import rgb_pixels
from molmo_training.data.formatting import SFT, Formatter
from molmo_training.data.media import PictureFile, VideoFile, open_picture
from molmo_training.data.packing import Size
from molmo_training.data.rows import FormattedRows, PendingRow, resolved
from molmo_training.data.sampling import (
    MediaSettings,
    annotated_frame_times,
    frame_times,
    times_at_best_rate,
)
from molmo_training.data.tokenize import Tokenizing
from molmo_training.recipes.tiny import IMAGES


@dataclass(frozen=True)
class Rows:
    rows: Sequence[Mapping[str, Any]]

    def __len__(self) -> int:
        return len(self.rows)

    def row(self, index: int) -> Mapping[str, Any]:
        return self.rows[index]


Source = Callable[..., FormattedRows]


@pytest.fixture
def source(tokenizing: Tokenizing) -> Source:
    def build(*rows: Mapping[str, Any], **media: Any) -> FormattedRows:
        return FormattedRows(
            table=Rows(rows),
            formatter=Formatter(settings=SFT),
            tokenizing=replace(tokenizing, images=replace(IMAGES, max_crops=4)),
            media=MediaSettings(**media),
        )

    return build


@pytest.fixture(scope="module")
def clip_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clips") / "clip.mp4"
    clip = sample_clip(
        np.random.default_rng(5), max_side_px=200, min_duration_s=4.0, max_duration_s=4.0
    )
    write_clip(clip, path)
    return path


def encoded(mode: str = "RGB") -> bytes:
    picture = Image.new(mode, (60, 30), (200, 10, 10, 0) if mode == "RGBA" else (200, 10, 10))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def made(rows: FormattedRows, index: int = 0, seed: int = 0) -> PendingRow:
    row = rows.make(index, np.random.default_rng(seed))
    assert isinstance(row, PendingRow)
    return row


def question(**fields: Any) -> dict[str, Any]:
    return {"style": "user_qa", "question": "what?", "answer": "this", **fields}


def test_a_picture_knows_how_it_is_displayed_from_its_header() -> None:
    noise = np.random.default_rng(0).integers(256, size=(30, 60, 3), dtype=np.uint8)
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    Image.fromarray(noise).save(buffer, "JPEG", exif=exif)
    data = buffer.getvalue()
    assert PictureFile(data[: len(data) // 2]).shape == (60, 30, 3)
    assert np.asarray(PictureFile(data)).shape == (60, 30, 3)
    with pytest.raises(InvalidMedia, match="cannot be read"):
        np.asarray(PictureFile(data[: len(data) // 2]))


def test_transparency_is_dropped_as_a_server_drops_it() -> None:
    data = encoded("RGBA")
    pixels = np.asarray(PictureFile(data))
    assert np.array_equal(pixels, rgb_pixels(data))
    assert np.array_equal(pixels, np.asarray(Image.open(io.BytesIO(data)))[..., :3])


def test_pictures_of_every_form_are_the_same(tmp_path: Path) -> None:
    data = encoded()
    path = tmp_path / "a.png"
    path.write_bytes(data)
    pixels = np.asarray(PictureFile(data))
    forms = [data, path, str(path), Image.open(path), pixels, {"bytes": data}, {"path": str(path)}]
    for form in forms:
        assert np.array_equal(np.asarray(open_picture(form)), pixels)
    for other in (
        3,
        np.zeros((3, 4), np.uint8),
        np.zeros((3, 4, 3)),
        np.zeros((3, 4, 4), np.uint8),
    ):
        with pytest.raises(InvalidMedia, match="none: give a path"):
            open_picture(other)
    with pytest.raises(InvalidMedia, match=r"gone\.png is not there"):
        _ = open_picture(tmp_path / "gone.png").shape


def test_sizes_are_known_before_pixels_are_opened(source: Source) -> None:
    opened: list[str] = []

    class Drawn:
        shape = (300, 400, 3)

        def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
            opened.append("opened")
            return np.zeros(self.shape, dtype=np.uint8)

    row = made(source(question(image=Drawn())))
    assert row.size.n_crops == 5
    assert opened == []
    tokenized = row.row()
    assert opened == ["opened"]
    assert Size(len(tokenized.input_ids), len(tokenized.crops)) == row.size


def test_a_header_that_lies_is_refused(source: Source) -> None:
    class Liar:
        shape = (300, 400, 3)

        def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
            return np.zeros((400, 300, 3), dtype=np.uint8)

    with pytest.raises(InvalidExample, match="where its header says"):
        made(source(question(image=Liar()))).row()


def test_of_many_images_the_first_are_seen_in_fewer_crops(source: Source) -> None:
    pictures = [np.full((200, 300, 3), k, dtype=np.uint8) for k in range(4)]
    by_label = {"star": [[[1, 1]], [], None, [[2, 2], [3, 3]]]}
    row = {"style": "multi_image_pointing", "images": pictures, "points_by_label": by_label}
    assert made(source(row)).size.n_crops == 4 * 5
    assert made(source(row, max_multi_image_crops=1)).size.n_crops == 4
    few = made(source(row, max_images=2, max_multi_image_crops=1))
    assert few.size.n_crops == 2
    assert [int(np.asarray(p)[0, 0, 0]) for p in few.example.images] == [0, 1]


def test_a_part_of_single_images_is_cut_finely(source: Source) -> None:
    rows = source(question(image=np.zeros((900, 900, 3), np.uint8)), p_high_res=0.5)
    crops = [made(rows, seed=seed).size.n_crops for seed in range(40)]
    assert set(crops) == {5, 17}
    assert 10 < crops.count(17) < 30
    again = [made(rows, seed=seed).size.n_crops for seed in range(40)]
    assert again == crops


@pytest.mark.parametrize(
    ("duration_s", "n", "first", "last"),
    [
        (0.5, 2, [0, 0.5], [0, 0.5]),
        (3.0, 7, [0, 0.5], [2.5, 3.0]),
        (10.2, 22, [0, 0.5], [10.0, 10.2]),
        (63.0, 127, [0, 0.5], [62.5, 63.0]),
        (63.5, 128, [0, 0.5], [63.0, 63.5]),
        (63.6, 128, [0, 0.5008], [63.0992, 63.6]),
        (120, 128, [0, 0.9449], [119.0551, 120]),
    ],
)
def test_times_of_the_reference(
    duration_s: float, n: int, first: list[float], last: list[float]
) -> None:
    times = frame_times(duration_s, 128, MediaSettings(), np.random.default_rng(0))
    assert len(times) == n
    np.testing.assert_allclose([*times[:2], *times[-2:]], [*first, *last], atol=1e-4)


@pytest.mark.parametrize(
    ("rates", "duration_s", "n", "last"),
    [
        ((2, 6), 5, 30, 29 / 6),
        ((2, 6), 20, 120, 119 / 6),
        ((2, 6), 64, 128, 63.5),
        ((2, 6), 600, 128, 63.5),
        ((1, 2, 3, 6), 64, 128, 63.5),
        ((1, 2, 3, 6), 100, 100, 99),
        ((1, 2, 3, 6), 600, 128, 127),
    ],
)
def test_times_at_candidate_rates_of_the_reference(
    rates: tuple[float, ...], duration_s: float, n: int, last: float
) -> None:
    settings = MediaSettings(frame_sampling="candidates", candidate_rates=rates)
    times = frame_times(duration_s, 128, settings, np.random.default_rng(0))
    assert (len(times), times[-1]) == (n, pytest.approx(last))
    annotated = annotated_frame_times(duration_s, 128, annotated_fps=rates[0], source_fps=6)
    assert annotated == times == times_at_best_rate(duration_s, 128, rates)


def test_rates_are_drawn_from_the_generator() -> None:
    several = MediaSettings(frame_rates=(1.0, 2.0))
    between = MediaSettings(frame_sampling="uniform_last_frame_sample_fps", frame_rates=(1.0, 2.0))
    for settings in (several, between):
        drawn = [len(frame_times(20.0, 128, settings, np.random.default_rng(k))) for k in range(30)]
        assert len(set(drawn)) > 1
        assert drawn[3] == len(frame_times(20.0, 128, settings, np.random.default_rng(3)))
        fixed = frame_times(20.0, 128, settings, np.random.default_rng(7), is_training=False)
        assert len(fixed) == 21
    uniform = MediaSettings(frame_sampling="uniform")
    assert frame_times(8.0, 4, uniform, np.random.default_rng(0)) == [0, 2, 4, 6]
    with pytest.raises(ValueError, match="draws between two"):
        MediaSettings(frame_sampling="uniform_last_frame_sample_fps")


@pytest.mark.parametrize(("duration_s", "fps", "most"), [(42.333, 3, 128), (5.1667, 6, 32)])
def test_rounding_lets_no_frame_too_many_in(duration_s: float, fps: float, most: int) -> None:
    settings = MediaSettings(frame_rates=(fps,))
    times = frame_times(duration_s, most, settings, np.random.default_rng(0))
    assert len(times) == most
    assert times[-1] == duration_s


def test_a_part_of_a_video_begins_at_zero(source: Source, clip_path: Path) -> None:
    row = question(
        style="video_short_answer", video=str(clip_path), clip_start_s=1.0, clip_end_s=3.2
    )
    pending = made(source(row))
    assert pending.example.frame_times_s == pytest.approx([0, 0.5, 1.0, 1.5, 2.0, 2.2])
    assert pending.example.frames.file_times_s == pytest.approx([1.0, 1.5, 2.0, 2.5, 3.0, 3.2])
    tokenized = pending.row()
    assert Size(len(tokenized.input_ids), len(tokenized.crops)) == pending.size
    whole = made(source({**row, "clip_start_s": None, "clip_end_s": None})).row()
    assert np.array_equal(tokenized.crops[0], whole.crops[2])
    assert made(source(row, max_frames=3)).size.n_crops == 3
    with pytest.raises(InvalidExample, match="is empty"):
        made(source({**row, "clip_start_s": 9.0}))


def test_tracks_are_sampled_at_a_multiple_of_their_rate(source: Source, clip_path: Path) -> None:
    info = VideoFile(clip_path).info
    points = [{"id": 1, "x": 10, "y": 10}]
    row = {
        "style": "video_point_track_per_frame",
        "label": "star",
        "video": clip_path,
        "sampling_fps": 1,
        "tracks": [{"time_s": t, "points": points} for t in (0.0, 1.0, 2.0, 3.0)],
    }
    pending = made(source(row))
    expected = annotated_frame_times(info.duration_s, 24, annotated_fps=1, source_fps=info.fps)
    assert pending.example.frame_times_s == expected
    answer = pending.example.branches[0].turns[-1].text
    assert answer.count(";") == 3


def test_rates_of_tracks_fit_the_video() -> None:
    def rate(annotated_fps: float, source_fps: float) -> float:
        times = annotated_frame_times(1.0, 128, annotated_fps=annotated_fps, source_fps=source_fps)
        return len(times)

    assert rate(2, 30) == 10
    assert rate(2, 24) == 8
    assert rate(2, 25) == rate(2, 30000 / 1001) == rate(2, 0) == 2
    assert rate(20, 30) == 20
    assert rate(1, 2) == 2


def test_points_in_pixels_are_those_of_the_frame_as_displayed(
    source: Source, clip_path: Path, tmp_path: Path
) -> None:
    path = tmp_path / "turned.mp4"
    subprocess.run(
        [
            "ffmpeg",
            "-v",
            "error",
            "-i",
            clip_path,
            "-c",
            "copy",
            "-metadata:s:v",
            "rotate=90",
            path,
        ],
        check=True,
    )
    video, stored = VideoFile(path), VideoFile(clip_path).info
    assert stored.width_px != stored.height_px
    assert video.size_hw == (stored.width_px, stored.height_px)
    row = {
        "style": "video_point",
        "label": "star",
        "video": path,
        "points": [{"time_s": 0.0, "points": [[video.size_hw[1] / 2, video.size_hw[0] / 4]]}],
    }
    answer = made(source(row)).example.branches[0].turns[-1].text
    assert answer == '<points coords="0.0 1 500 250">star</points>'


def test_video_that_is_none_is_named(source: Source, tmp_path: Path) -> None:
    path = tmp_path / "broken.mp4"
    path.write_bytes(b"no video")
    with pytest.raises(InvalidMedia, match=r"broken\.mp4 cannot be read"):
        made(source(question(video=path)))
    with pytest.raises(InvalidMedia, match=r"gone\.mp4 is not there"):
        made(source(question(video=tmp_path / "gone.mp4")))
    with pytest.raises(InvalidExample, match="image and video: give one"):
        made(source(question(video=path, image=path)))


def test_what_a_row_leaves_open_is_drawn() -> None:
    row = {
        "style": "a",
        "one_of": [{"label": "x"}, {"label": "y", "style": "b"}],
        "rates": [1, 3],
        "message_list": [{"one_of": [{"text": "1"}, {"text": "2"}]}, {"text": "3"}],
    }
    drawn = [resolved(row, np.random.default_rng(k)) for k in range(60)]
    styles = [r["style"] for r in drawn]
    assert 35 < styles.count("b") < 55
    assert {r["message_list"][0]["text"] for r in drawn} == {"1", "2"}
    assert all(r["message_list"][1] == {"text": "3"} for r in drawn)
    with pytest.raises(InvalidExample, match="as many rates"):
        resolved({"one_of": [{}], "rates": [1, 2]}, np.random.default_rng(0))


def test_an_answer_is_about_objects_that_have_numbers(source: Source) -> None:
    row = question(image=np.zeros((30, 40, 3), np.uint8), about=[0, 62])
    assert made(source(row)).example.branches[0].about == (0, 62)
    for numbers in ([63], [-1], ["0"], [0.5]):
        with pytest.raises(InvalidExample, match="numbers of objects, from 0 to 62"):
            made(source({**row, "about": numbers}))
