"""What a newcomer does: `molmo serve`, then the line that it prints. Real vLLM, packaged model."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import pytest
from openai import OpenAI

from molmo_client import Client
from molmo_core.errors import PromptTooLong
from tests.client.example_scene import EXAMPLE_SCENE

EXAMPLE = str(files("molmo_client") / "examples" / "shapes.png")
DIAGONAL_PX = (EXAMPLE_SCENE.width_px**2 + EXAMPLE_SCENE.height_px**2) ** 0.5


@dataclass(frozen=True, kw_only=True)
class Served:
    process: subprocess.Popen[str]
    url: str
    command: list[str]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("serve")
    with (folder / "errors.txt").open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "molmo_client", "serve", "--port", "0"],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    try:
        assert process.stdout is not None
        told = ""
        while "molmo point" not in told:
            line = process.stdout.readline()
            assert line, (folder / "errors.txt").read_text()[-3000:]
            told += line
        address = re.search(r"http://127\.0\.0\.1:\d+", told)
        assert address is not None, told
        yield Served(
            process=process, url=address.group(), command=shlex.split(told.splitlines()[-1])
        )
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=120) == 0
        process.stdout.close()


def distances(client: Client, asked: str, shape: str, colour: str) -> list[float]:
    """Of each point to the nearest object of the kind, as parts of the diagonal."""
    wanted = [o for o in EXAMPLE_SCENE.objects if (o.shape, o.colour) == (shape, colour)]
    points = client.point(EXAMPLE, asked).points
    assert len(points) == len(wanted), points
    return [
        min(((p.pixel.x - o.x_px) ** 2 + (p.pixel.y - o.y_px) ** 2) ** 0.5 for o in wanted)
        / DIAGONAL_PX
        for p in points
    ]


def test_the_printed_line_answers_rightly(served: Served) -> None:
    program, *arguments = served.command
    assert program.endswith("molmo")
    ended = subprocess.run(
        [sys.executable, "-m", "molmo_client", *arguments], capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    lines = ended.stdout.splitlines()
    assert lines[0] == "1 found"
    place = re.search(r"x\s+([\d.]+) px\s+y\s+([\d.]+) px", lines[1])
    assert place is not None
    circle = EXAMPLE_SCENE.objects[0]
    x_px, y_px = map(float, place.groups())
    assert ((x_px - circle.x_px) ** 2 + (y_px - circle.y_px) ** 2) ** 0.5 < 0.05 * DIAGONAL_PX


def test_other_objects_several_alike_and_one_that_is_not_there(served: Served) -> None:
    with Client(served.url) as client:
        assert max(distances(client, "the green square", "square", "green")) < 0.05
        assert max(distances(client, "the blue stars", "star", "blue")) < 0.05
        assert client.count(EXAMPLE, "stars").count == 2
        none = client.point(EXAMPLE, "yellow triangles")
        assert (none.found, none.points) == (False, [])


def test_openais_client_gets_grounding_and_the_name_of_the_checkpoint(served: Served) -> None:
    with Client(served.url) as client:
        name = client.models().data[0].checkpoint
    openai = OpenAI(base_url=f"{served.url}/v1", api_key="none")
    answer = openai.chat.completions.create(
        model="molmo2",
        messages=[{"role": "user", "content": "Say hello."}],
        max_tokens=4,
        temperature=0,
    )
    assert answer.system_fingerprint == name
    assert answer.choices[0].message.model_extra is not None
    assert answer.choices[0].message.model_extra["grounding"]["points"] == []


def test_bad_input_never_reaches_the_engine_and_it_lives(served: Served) -> None:
    with Client(served.url) as client:
        with pytest.raises(PromptTooLong):
            client.query(EXAMPLE, "stars " * 5000)
        assert client.caption(EXAMPLE).caption
    assert served.process.poll() is None


def test_nothing_is_left_when_it_ends(tmp_path: Path) -> None:
    """Ended while its engine starts: no process of ours stays."""
    marker = f"molmo-e2e-{os.getpid()}"
    environment = {**os.environ, "MOLMO_RUN_DIR": str(tmp_path / marker)}
    process = subprocess.Popen(
        [sys.executable, "-m", "molmo_client", "serve", "--port", "0"],
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    with process:
        assert process.stderr is not None
        assert "the engine is starting" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        process.stderr.read()
        assert process.wait(timeout=120) == 0
    holders = [
        p.parent.name
        for p in Path("/proc").glob("[0-9]*/environ")
        if marker.encode() in _read(p) and int(p.parent.name) != os.getpid()
    ]
    assert holders == []


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except (ProcessLookupError, PermissionError, FileNotFoundError):
        return b""
