"""What `molmo data check` finds, each fault in a file of its own or beside good rows."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from molmo_client.__main__ import main
from molmo_training.data.own import check
from molmo_training.data.own.check import Report, check_tables, mixture_of
from molmo_training.data.own.examine import Examiner
from molmo_training.data.own.media import opened_media
from molmo_training.data.own.model_view import ModelView, packaged_checkpoint
from molmo_training.data.own.table import open_table, open_tables
from tests.training.own.conftest import WriteRows, picture, view_of

GOOD = {"image": "a.png", "label": "cat", "points": [[10, 20]]}
TALK = {"messages": ["q", "a"]}


def checked(path: Path, view: ModelView, **options: Any) -> list[tuple[str, str, str]]:
    tables = open_tables([path])
    report = check_tables(tables, view, mixture=mixture_of(tables), **options)
    return [tuple(found) for found in report.files[0].findings]


@pytest.mark.parametrize(
    ("row", "kind", "field", "message"),
    [
        ({**GOOD, "lable": "x"}, "row", "lable", "unknown field 'lable'"),
        ({"image": "a.png", "style": "vqa2"}, "row", None, "'answer'"),
        ({**GOOD, "points": [[641, 20]]}, "points", "points", "(641, 20), outside 0…640"),
        (
            {**GOOD, "points": [[1, 2], [-1, 2]]},
            "points",
            "points",
            "points[1] is (-1, 2)",
        ),
        ({**GOOD, "points": [[float("nan"), 2]]}, "points", "points", "is [nan, 2]; give"),
        ({**GOOD, "points": [[float("inf"), 2]]}, "points", "points", "of numbers"),
        ({**GOOD, "points": [[1, 2, 3]]}, "points", "points", "give [x, y]"),
        ({**GOOD, "point_scale": 0}, "points", "points", "points[0]"),
        (
            {"image": "a.png", "message_list": [TALK, {"label": "x", "points": [[1, 999]]}]},
            "points",
            "points",
            "points[0] in message_list[1] is (1, 999), outside 0…640 × 0…480 (pixels)",
        ),
        (
            {
                "images": ["a.png", "b.png"],
                "points_by_label": {"a": [[], []], "b": [[], [[0, 481]]]},
            },
            "points",
            "points_by_label",
            "the points of 'b'[1][0] is (0, 481)",
        ),
        (
            {
                "video": "v.mp4",
                "label": "x",
                "point_scale": 100,
                "tracks": [{"time_s": 0.0, "points": [{"id": 1, "x": 0, "y": 101}]}],
            },
            "points",
            "tracks",
            "tracks[0].points[0] is (0, 101), outside 0…100 × 0…100 (point_scale 100)",
        ),
        (
            {
                "video": "v.mp4",
                "label": "x",
                "point_scale": 100,
                "tracks": [{"time_s": 0.3, "points": [{"id": 1, "x": 0, "y": 1}]}],
            },
            "tracks unseen",
            "tracks",
            "no annotated moment falls on a frame",
        ),
        (
            {"image": "a.png", "messages": ["q", "a<|im_end|>"]},
            "control token",
            None,
            "messages[1] spells the control token '<|im_end|>'",
        ),
        (
            {"image": "a.png", "points_by_label": {"<im_patch>": [[]]}},
            "control token",
            None,
            "a name in points_by_label spells the control token '<im_patch>'",
        ),
        (
            {**GOOD, "style": "poiting", "answer": "a"},
            "style",
            "style",
            "'pointing' meant",
        ),
    ],
)
def test_a_fault_of_a_row(
    write_rows: WriteRows,
    view: ModelView,
    row: dict[str, Any],
    kind: str,
    field: str | None,
    message: str,
) -> None:
    [found] = checked(write_rows(TALK, row), view)
    column = "" if field is None else f":{json.dumps(row).index(json.dumps(field)) + 1}"
    assert found[:2] == (kind, f"rows.jsonl:2{column}")
    assert message in found[2]


def test_a_line_that_is_no_json(write_rows: WriteRows, view: ModelView, tmp_path: Path) -> None:
    path = write_rows(TALK, name="a: b.jsonl")
    path.write_text(path.read_text() + '\n{"image": }\n[]', encoding="utf-8")
    assert checked(path, view) == [
        (
            "row",
            "a: b.jsonl:2:11",
            "the line is no JSON (Expecting value): write one object a line",
        ),
        (
            "row",
            "a: b.jsonl:3",
            'a row is an object of fields, this is []: give {"image": …, "label": …, '
            '"points": …} or other fields',
        ),
    ]


def test_clipped_and_occluded_places_are_no_fault(write_rows: WriteRows, view: ModelView) -> None:
    sighting = {"id": 1, "x": 900, "y": 1, "occluded": True}
    moments = [{"time_s": 0, "points": [sighting, {"id": 2, "x": 1, "y": 1}]}]
    rows = [
        {**GOOD, "points": [[9999, 0]], "clip_points": True},
        {"video": "v.mp4", "label": "x", "point_scale": 100, "tracks": moments},
    ]
    assert checked(write_rows(*rows), view) == []


def saved(image: Image.Image, form: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def test_corrupt_media_are_findings(
    write_rows: WriteRows, view: ModelView, tmp_path: Path, clip: Path
) -> None:
    image = Image.fromarray(picture(640, 480))
    jpeg, png, video = saved(image, "JPEG"), saved(image, "PNG"), clip.read_bytes()
    files = {
        "cut.jpg": jpeg[: len(jpeg) // 2],
        "cut.png": png[: len(png) // 2],
        "head.jpg": jpeg[:12],
        "empty.png": b"",
        "text.png": b"hello",
        "zero.png": b"\x89PNG\r\n\x1a\n" + b"\0" * 5000,
        "cut.mp4": video[: len(video) // 3],
        "text.mp4": b"no video",
    }
    media = [{"video" if name.endswith("mp4") else "image": name, "text": name} for name in files]
    path = write_rows(*media)
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    found = checked(path, view, n_shown=20)
    assert [(kind, where) for kind, where, _ in found] == [
        ("media corrupt", f"rows.jsonl:{k + 1}") for k in range(len(files))
    ]
    assert all(name in text for name, (_, _, text) in zip(files, found, strict=True))


def test_missing_media_and_what_is_no_file(
    write_rows: WriteRows, view: ModelView, tmp_path: Path
) -> None:
    path = write_rows(
        {"images": ["a.png", "gone.png", "folder", "pipe"], "text": "x"}, {"image": "b.png", **TALK}
    )
    for name in ("gone.png", "folder", "pipe"):
        (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    found = checked(path, view)
    assert [kind for kind, _, _ in found] == ["media missing"] * 3
    assert [text.split(": ")[0].rsplit("/", 1)[1] for _, _, text in found] == [
        "gone.png is not there",
        "folder is no file",
        "pipe is no file",
    ]


def test_a_fault_in_the_pixels_needs_decoding(
    write_rows: WriteRows, view: ModelView, tmp_path: Path
) -> None:
    path = write_rows({"image": "a.png", "text": "x"})
    content = bytearray((tmp_path / "a.png").read_bytes())
    content[200:260] = b"\xff" * 60
    (tmp_path / "a.png").write_bytes(content)
    assert [kind for kind, _, _ in checked(path, view, opens_media=True)] == ["media corrupt"]


def test_a_turned_picture_counts_as_displayed(
    write_rows: WriteRows, view: ModelView, tmp_path: Path
) -> None:
    path = write_rows({**GOOD, "image": "a.jpg", "points": [[470, 630]]})
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(picture(640, 480)).save(tmp_path / "a.jpg", exif=turned)
    assert checked(path, view) == []
    [shape] = [one.shape for one in opened_media(open_table(path).row(0)).pictures]
    assert shape == (640, 480, 3)


@pytest.mark.parametrize("is_behind", [False, True])
def test_a_turned_png_is_seen_without_its_pixels(
    write_rows: WriteRows, tmp_path: Path, is_behind: bool
) -> None:
    path = write_rows({"image": "a.png", "text": "x"}, {"image": "plain.png", "text": "x"})
    turned = Image.Exif()
    turned[0x0112] = 6
    content = saved(Image.fromarray(picture(640, 480)), "PNG", exif=turned)
    if is_behind:
        begin = content.index(b"eXIf") - 4
        end = begin + 12 + int.from_bytes(content[begin : begin + 4], "big")
        content = content[:begin] + content[end:-12] + content[begin:end] + content[-12:]
    (tmp_path / "a.png").write_bytes(content)
    shapes = [opened_media(open_table(path).row(k)).pictures[0].shape for k in range(2)]
    assert shapes == [(640, 480, 3), (480, 640, 3)]
    for k, shape in enumerate(shapes):
        assert np.asarray(opened_media(open_table(path).row(k)).pictures[0]).shape == shape


def test_too_long_and_cut(write_rows: WriteRows) -> None:
    path = write_rows(
        {"messages": ["q", "word " * 50]},
        {"messages": ["word " * 90, "a"]},
        {"image": "a.png", "messages": ["q", "a"]},
    )
    found = checked(path, view_of(n_tokens=100, n_crops=1))
    assert [(kind, where) for kind, where, _ in found] == [
        ("too long", "rows.jsonl:2"),
        ("cut", "rows.jsonl:1"),
    ]
    assert "a pack holds 100: " in found[1][2]
    assert "answer tokens are lost" in found[1][2]
    several = write_rows({"images": ["a.png", "b.png"], **TALK}, name="several.jsonl")
    [found_one] = checked(several, view_of(n_tokens=1000, n_crops=1))
    assert found_one == (
        "too long",
        "several.jsonl:1",
        "2 crops or frames, a pack holds 1: it is left out",
    )


@pytest.mark.parametrize(
    ("points", "scale", "doubt"),
    [
        ([[0.1 * k, 0.5] for k in range(9)], {}, "parts of the side, set point_scale to 1"),
        ([[10 * k, 50] for k in range(9)], {}, "per cent, set point_scale to 100"),
        ([[0.1 * k, 0.5] for k in range(9)], {"point_scale": 100}, "set point_scale to 1"),
        ([[0.1 * k, 0.5] for k in range(9)], {"point_scale": 1}, None),
        ([[60 * k, 50] for k in range(9)], {}, None),
        ([[0.1 * k, 0.5] for k in range(7)], {}, None),
    ],
)
def test_a_scale_that_is_probably_wrong(
    write_rows: WriteRows, view: ModelView, points: Any, scale: dict[str, Any], doubt: str | None
) -> None:
    rows = [{**GOOD, "points": [xy], "label": f"cat {k}", **scale} for k, xy in enumerate(points)]
    found = checked(write_rows(*rows), view)
    assert [kind for kind, _, _ in found] == (["scale"] if doubt else [])
    assert all(doubt in text for _, _, text in found if doubt)


def test_duplicates_are_found_across_files(write_rows: WriteRows, view: ModelView) -> None:
    first = write_rows(GOOD, {**GOOD, "metadata": {"n": 2}}, TALK)
    second = write_rows({**GOOD, "label": "dog"}, GOOD, name="more.jsonl")
    tables = open_tables([first, second])
    report = check_tables(tables, view, mixture=mixture_of(tables))
    assert [tuple(found) for file in report.files for found in file.findings] == [
        ("duplicate", "rows.jsonl:2", "says the same as rows.jsonl:1"),
        ("duplicate", "more.jsonl:2", "says the same as rows.jsonl:1"),
    ]
    assert report.files[0].n_usable == 3


def test_findings_are_capped_and_counted(write_rows: WriteRows, view: ModelView) -> None:
    path = write_rows(*[{"lable": k} for k in range(30)])
    tables = open_tables([path])
    report = check_tables(tables, view, mixture=mixture_of(tables), n_shown=3)
    assert report.files[0].counts == {"row": 30}
    assert len(report.files[0].findings) == 3
    assert "… and 27 more" in report.as_text()


def test_sizes_and_packs(write_rows: WriteRows) -> None:
    path = write_rows(*[{"messages": ["q", "a" * (k + 1)]} for k in range(100)])
    tables = open_tables([path])
    view = view_of(n_tokens=500, n_crops=4)
    report = check_tables(tables, view, mixture=mixture_of(tables))
    [file], [sizes] = report.files, report.files[0].styles
    rows = view.rows(open_table(path))
    lengths = [rows.make(k, np.random.default_rng(k)).size.n_tokens for k in range(100)]
    assert file.n_tokens == sum(lengths)
    assert file.n_packs(report.budgets) == -(-sum(lengths) // 500)
    assert sizes.tokens[-1] == max(lengths)
    assert sizes.tokens[0] == sorted(lengths)[50]
    assert sizes.crops == (0, 0, 0, 0)


def test_processes_find_the_same(
    write_rows: WriteRows, view: ModelView, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "_ROWS_AT_ONCE", 4)
    rows = [{**GOOD, "label": f"cat {k}", "points": [[k * 60, 3]]} for k in range(14)]
    tables = open_tables([write_rows(*rows)])

    def report(n_jobs: int) -> Report:
        return check_tables(tables, view, mixture=mixture_of(tables), n_jobs=n_jobs)

    assert report(2) == report(1)
    assert report(1).files[0].counts == {"points": 3}


def test_whatever_fails_is_a_finding(
    write_rows: WriteRows, view: ModelView, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(*_: object) -> None:
        raise MemoryError("too much")

    monkeypatch.setattr("molmo_training.data.own.examine.opened_media", breaks)
    table = open_table(write_rows(GOOD))
    facts = Examiner(table=table, view=view)(0)
    assert [found[:] for found in facts.findings] == [
        ("row", "rows.jsonl:1", "MemoryError: too much")
    ]


def test_the_command(write_rows: WriteRows, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = str(write_rows(GOOD)), str(write_rows(TALK, {"la\x1b[2Jble": 1}, name="bad.jsonl"))
    assert main(["data", "check", good]) == 0
    assert capsys.readouterr().out.startswith("rows: 1 rows, 1 of them usable; an epoch fills")
    assert main(["data", "check", good, bad, "--rate", "3", "--rate", "1", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["n_findings"] == 1
    assert report["shares"] == {"bad": 0.25, "rows": 0.75}
    assert report["files"][1]["findings"][0]["where"].startswith("bad.jsonl:2")
    assert report["files"][0]["styles"][0]["tokens"]["max"] > 50
    assert main(["data", "check", good, bad]) == 1
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "effective shares" in out


def test_media_elsewhere_and_another_model(
    write_rows: WriteRows, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows(GOOD)
    path = tmp_path / "data" / "rows.jsonl"
    path.parent.mkdir()
    path.write_text(json.dumps({**GOOD, "image": str(tmp_path / "a.png")}))
    command = ["data", "check", str(path), "--checkpoint", str(packaged_checkpoint())]
    assert main(command) == 1
    assert "allow other places with --allow-absolute" in capsys.readouterr().out
    assert main([*command, "--allow-absolute"]) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["gone.jsonl"], "there is no file or folder 'gone.jsonl'"),
        (["{good}", "--rate", "1", "--rate", "2"], "2 rates for 1 files"),
        (["{good}", "--checkpoint", "gone"], "there is no folder 'gone'"),
    ],
)
def test_wrong_options_are_told(
    write_rows: WriteRows, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    good = str(write_rows(GOOD))
    assert main(["data", "check", *(option.format(good=good) for option in options)]) == 1
    assert message in capsys.readouterr().err
