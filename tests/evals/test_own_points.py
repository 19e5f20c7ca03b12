"""A user's file of pictures with points as an evaluation: rows, scores, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from molmo_client.__main__ import main
from molmo_core import api
from molmo_core.errors import InvalidRequest
from molmo_evals.tasks.own_points import own_points
from tests.support.gateway import RunningGateway


def write_rows(folder: Path, *rows: object) -> Path:
    Image.new("RGB", (200, 100)).save(folder / "wide.png")
    file = folder / "mine.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


ROW = {"image": "wide.png", "label": "cats", "points": [[50, 25], [150, 75]]}


def answer_of(*points: tuple[float, float]) -> api.PointAnswer:
    return api.PointAnswer.model_construct(
        points=[
            api.Point.model_construct(id=k, x=x, y=y, media_index=0)
            for k, (x, y) in enumerate(points)
        ]
    )


@pytest.mark.parametrize(
    "row",
    [
        ROW,
        {**ROW, "points": [{"x": 0.25, "y": 0.25}, {"x": 0.75, "y": 0.75}], "point_scale": 1},
        {**ROW, "points": [[25, 25], [75, 75]], "point_scale": 100},
        {**ROW, "points": [[100, 25], [300, 75]], "width": 400, "height": 100},
        {**ROW, "points": [[25, 25], [75, 75]], "point_scale": 100, "width": 400, "height": 100},
    ],
)
def test_points_of_any_scale_are_places_in_the_picture(tmp_path: Path, row: object) -> None:
    (sample,) = own_points(write_rows(tmp_path, row)).samples(0, 10)
    assert (sample.verb, sample.text) == ("point", "cats")
    assert sample.media() == [(tmp_path / "wide.png").read_bytes()]
    assert sample.failed.numbers == {"n_hits": 0, "n_predicted": 0, "n_true": 2}
    score = sample.score(answer_of((0.25, 0.25), (0.5, 0.1)))
    assert score.numbers == {"n_hits": 1, "n_predicted": 2, "n_true": 2}


def test_a_turned_picture_is_measured_as_it_is_seen(tmp_path: Path) -> None:
    file = write_rows(tmp_path, {**ROW, "points": [[50, 100]]})
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (200, 100)).save(tmp_path / "wide.png", exif=exif)
    (sample,) = own_points(file).samples(0, 1)
    assert sample.score(answer_of((0.5, 0.5))).numbers["n_hits"] == 1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**ROW, "image": "gone.png"}, "mine.jsonl:1: the picture .*gone.png cannot be read"),
        ({**ROW, "lable": "cats"}, "has \\['lable'\\]; an evaluation of points reads"),
        ({"image": "wide.png", "points": []}, "lacks image or label"),
        ({**ROW, "points": [[1]]}, "give a list of \\[x, y\\]"),
        ({**ROW, "points": None}, "has the points None"),
        ({**ROW, "point_scale": 0}, "has the points"),
        ({**ROW, "width": 400}, "has the points"),
        ([1], "has list"),
    ],
)
def test_rows_that_say_nothing_are_refused_by_line(
    tmp_path: Path, row: object, message: str
) -> None:
    with pytest.raises(InvalidRequest, match=message):
        own_points(write_rows(tmp_path, row))


def test_files_that_are_none(tmp_path: Path) -> None:
    for content, message in ((b"\xff\xfe", "as UTF-8"), (b"\n", "no rows"), (b"{", "is no JSON")):
        file = tmp_path / "mine.jsonl"
        file.write_bytes(content)
        with pytest.raises(InvalidRequest, match=message):
            own_points(file)
    with pytest.raises(InvalidRequest, match="cannot be read"):
        own_points(tmp_path / "gone.jsonl")


def test_the_log_of_a_file_is_that_of_its_rows(tmp_path: Path) -> None:
    first = own_points(write_rows(tmp_path, ROW)).name
    assert first == own_points(write_rows(tmp_path, ROW)).name
    assert first != own_points(write_rows(tmp_path, ROW, ROW)).name


def test_the_command_measures_a_file(
    gateway: RunningGateway, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_rows(tmp_path, ROW, {**ROW, "points": []})
    options = ["--server", gateway.url, "--folder", str(tmp_path / "log"), "--json"]
    assert main(["eval", "run", str(file), *options]) == 0
    report = json.loads(capsys.readouterr().out)
    (group,) = report["groups"]
    assert (group["group"], group["n"]) == ("points", 2)
    assert main(["eval", "run", str(tmp_path / "gone.jsonl"), *options]) == 2
    assert "cannot be read" in capsys.readouterr().err
