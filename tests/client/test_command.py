"""The `molmo` command: what it prints where, its exit codes, what it loads."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from molmo_client.__main__ import LAZY_COMMANDS, main
from molmo_client.draw import PALETTE
from molmo_core.scenes import draw_scene
from tests.client.example_scene import EXAMPLE_SCENE
from tests.server import media
from tests.support.gateway import RunningGateway

EXAMPLE = Path(str(files("molmo_client") / "examples" / "shapes.png"))
CIRCLE = '<points coords="1 1 217 267">red circle</points>'
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(gateway: RunningGateway, capsys: pytest.CaptureFixture[str]) -> Run:
    """(exit code, output, errors) of a question to the gateway."""

    def run(*tokens: object) -> tuple[int, str, str]:
        code = main([*map(str, tokens), "--server", gateway.url])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    path = tmp_path / "clip.mp4"
    path.write_bytes(media.video())
    return path


def test_the_bundled_picture_is_what_its_source_draws() -> None:
    with Image.open(EXAMPLE) as picture:
        assert (np.asarray(picture) == draw_scene(EXAMPLE_SCENE)).all()


def test_point(run: Run, gateway: RunningGateway) -> None:
    gateway.engine.script["red circle"] = CIRCLE
    code, out, err = run("point", EXAMPLE, "the red circle")
    assert (code, err) == (0, "")
    assert out == "1 found\n  1  x   104.2 px  y    96.1 px  red circle\n"


def test_point_as_json(run: Run, gateway: RunningGateway) -> None:
    gateway.engine.script["red circle"] = CIRCLE
    code, out, _ = run("point", EXAMPLE, "the red circle", "--json")
    answer = json.loads(out)
    assert code == 0
    assert (answer["points"][0]["x"], answer["points"][0]["y"]) == (0.217, 0.267)
    assert answer["text"] == CIRCLE


def test_nothing_found(run: Run, gateway: RunningGateway) -> None:
    gateway.engine.script["cats"] = "There are none."
    gateway.engine.script["dogs"] = "I see a field."
    assert run("point", EXAMPLE, "cats")[:2] == (0, "There are none.\n")
    assert run("count", EXAMPLE, "cats")[:2] == (0, "0\n")
    assert run("point", EXAMPLE, "dogs")[:2] == (0, "No points in: I see a field.\n")
    assert run("count", EXAMPLE, "dogs")[:2] == (0, "I see a field.\n")


def test_options_of_places(run: Run, gateway: RunningGateway) -> None:
    gateway.engine.script["red circle"] = CIRCLE
    options = ("--confidence", "--max-points", 3, "--region", 0, 0, 0.5, 1, "--free")
    code, out, _ = run("point", EXAMPLE, "the red circle", *options)
    assert (code, out) == (
        0, "1 found\n  1  x    52.1 px  y    96.1 px   76 %  red circle\n"
    )  # fmt: skip
    request = gateway.engine.requests[-1]
    assert (request["logprobs"], "structured_outputs" in request) == (True, False)
    code, _, err = run("point", EXAMPLE, "x", "--region", 1, 0, 0, 1)
    assert code == 2
    assert "--region is not one" in err


def test_several_objects(run: Run, gateway: RunningGateway) -> None:
    gateway.engine.script |= {"cats": "There are none.", "dogs": "?", "circle": CIRCLE}
    code, out, _ = run("count", EXAMPLE, "circles", "cats", "dogs")
    assert (code, out) == (0, "1 circles\n0 cats\n- dogs\n")
    assert run("point", EXAMPLE, "circles", "cats")[1].startswith("1 found\n")


def test_tracks_between_observations(run: Run, gateway: RunningGateway, clip: Path) -> None:
    gateway.engine.script["ball"] = '<tracks coords="0.0 1 500 500;1.0 1 500 500">b</tracks>'
    _, out, _ = run("track", clip, "ball", "--frame-rate", 1, "--interpolate")
    assert len(out.splitlines()) == 2 + 26
    assert sum(line.endswith("interpolated") for line in out.splitlines()) == 24


def test_count_and_words(run: Run, gateway: RunningGateway) -> None:
    gateway.engine.script["stars"] = '<points coords="1 1 100 100 2 900 900">stars</points>'
    gateway.engine.script["Why"] = f"Because. {CIRCLE}"
    gateway.engine.script[""] = "A circle."
    assert run("count", EXAMPLE, "stars")[1] == "2\n"
    assert run("caption", EXAMPLE)[1] == "A circle.\n"
    assert run("ask", EXAMPLE, "Why?")[1].splitlines() == [
        f"Because. {CIRCLE}",
        "  1  x   104.2 px  y    96.1 px  red circle",
    ]


def test_track(run: Run, gateway: RunningGateway, clip: Path, tmp_path: Path) -> None:
    gateway.engine.script["ball"] = (
        '<tracks coords="0.0 1 500 500;0.5 1 600 500;1.0 1 700 500">ball</tracks>'
    )
    out_path = tmp_path / "out.mp4"
    code, out, err = run("track", clip, "ball", "--draw", out_path)
    assert code == 0
    assert out.splitlines()[:3] == [
        "1 found",
        "track 1  ball",
        "       0.00 s  frame 0    x    32.0 px  y    16.0 px",
    ]
    assert err == f"molmo: wrote {out_path}\n"
    with av.open(str(out_path)) as drawn:
        first = next(drawn.decode(video=0)).to_ndarray(format="rgb24")
    assert np.abs(first[16, 32].astype(int) - PALETTE[0]).max() < 60


def test_draw_a_picture(run: Run, gateway: RunningGateway, tmp_path: Path) -> None:
    gateway.engine.script["red circle"] = CIRCLE
    code, out, _ = run("point", EXAMPLE, "the red circle", "--draw", tmp_path / "out.png")
    assert code == 0
    assert out.startswith("1 found")
    with Image.open(tmp_path / "out.png") as drawn:
        assert drawn.getpixel((104, 96)) == PALETTE[0]


def test_a_model_cannot_steer_the_terminal(run: Run, gateway: RunningGateway) -> None:
    gateway.engine.script[""] = "\x1b]0;owned\x07\x1b[2Jred\r\ntext"
    code, out, _ = run("caption", EXAMPLE)
    assert code == 0
    assert "\x1b" not in out
    assert "\x07" not in out
    assert "\r" not in out


def test_warnings_are_told_beside_the_answer(run: Run, gateway: RunningGateway) -> None:
    gateway.engine.script["dots"] = '<points coords="1 1 250 500 2 7">dots</points>'
    code, out, err = run("point", EXAMPLE, "dots")
    assert code == 0
    assert out.startswith("1 found")
    assert err.startswith("molmo: warning: ")


@pytest.mark.parametrize(
    ("tokens", "code", "message"),
    [
        (["point", "missing.png", "x"], 2, "there is no file missing.png"),
        (["point", str(EXAMPLE)], 2, "OBJECT"),
        (["pont", str(EXAMPLE), "x"], 2, 'Did you mean "point"?'),
        (["point", str(EXAMPLE), "x", "--jsn"], 2, "--jsn"),
        (["point", str(EXAMPLE), "x", "--draw", "out.mp4"], 2, "ends in .png, .jpg"),
        (["point", str(EXAMPLE), "x", "--draw", "no/out.png"], 2, "there is no folder no"),
        (["point", str(EXAMPLE), "<im_end>"], 1, "control token '<im_end>'"),
        (["point", str(EXAMPLE), "[400]"], 1, "[request "),
        (["point", "note.txt", "x"], 1, "is no picture or video"),
        (["track", str(EXAMPLE), "x"], 1, "tracking takes one video"),
        (["caption", str(EXAMPLE), "--model", "gpt"], 1, "there is no model 'gpt'"),
    ],
)
def test_what_goes_wrong_is_told_in_one_line(
    run: Run,
    tokens: list[str],
    code: int,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "note.txt").write_text("hello")
    ended, out, err = run(*tokens)
    assert (ended, out) == (code, "")
    assert message in err
    assert err.startswith("molmo: ")
    assert err.count("\n") == 1


def test_no_server(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["point", str(EXAMPLE), "x", "--server", "http://127.0.0.1:9"]) == 3
    told = capsys.readouterr()
    assert told.out == ""
    assert "start it with `molmo serve`" in told.err
    assert "Traceback" not in told.err


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    for name in ("serve", "demo", "point", "count", "track", "caption", "ask", "eval"):
        assert f" {name} " in out
    assert "3 no server reachable" in out


def test_every_other_command_answers_help(capsys: pytest.CaptureFixture[str]) -> None:
    for row in LAZY_COMMANDS:
        assert main([row.name, "--help"]) == 0
        assert f"molmo {row.name}" in capsys.readouterr().out


def test_a_missing_extra_is_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "molmo_demo.app", None)
    assert main(["demo"]) == 1
    assert "pip install 'molmo-serve[demo]'" in capsys.readouterr().err


def test_a_question_loads_nothing_heavy(gateway: RunningGateway) -> None:
    heavy = "('torch', 'transformers', 'vllm', 'av', 'fastapi', 'gradio', 'rich', 'scipy')"
    program = (
        "import sys; from molmo_client.__main__ import main; code = main(sys.argv[1:]);"
        f"print([name for name in {heavy} if name in sys.modules]); sys.exit(code)"
    )
    command = [sys.executable, "-c", program, "caption", EXAMPLE, "--server", gateway.url]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines()[-1] == "[]"


def test_a_closed_pipe_is_no_error(gateway: RunningGateway) -> None:
    command = [sys.executable, "-m", "molmo_client", "caption", EXAMPLE, "--server", gateway.url]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == b""
        assert process.wait(timeout=300) == 0
