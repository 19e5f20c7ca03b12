"""`molmo eval` against a real gateway: a perfect engine, a poor one, and none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from molmo_client import RetryPolicy
from molmo_client.__main__ import main
from molmo_evals.task import find_task
from molmo_evals.tasks.scenes import GROUPS
from molmo_server.checkpoints.folder import read_checkpoint
from tests.evals.conftest import oracle_of
from tests.support.gateway import RunningGateway

SEED = 3


def learn_all(gateway: RunningGateway, folder: Path, n: int) -> None:
    geometry = read_checkpoint(folder).video
    oracle_of(gateway).learn(find_task("scenes").samples(SEED, n), geometry)


def run_scenes(gateway: RunningGateway, folder: Path, *more: str) -> int:
    options = ["--n", "1", "--seed", str(SEED), "--folder", str(folder), *more]
    return main(["eval", "run", "scenes", "--server", gateway.url, *options])


def test_a_perfect_engine_reaches_every_target(
    gateway: RunningGateway,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    learn_all(gateway, folder, 1)
    assert run_scenes(gateway, tmp_path, "--json", "--check") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["passed"] is True
    assert report["checkpoint"].startswith("small@")
    assert [row["group"] for row in report["groups"]] == [group.name for group in GROUPS]
    # Molmo2 writes coordinates in thousandths and times in tenths: tracks lose nothing by that.
    assert {row["group"]: row["value"] for row in report["groups"]} == {
        group.name: 1.0 for group in GROUPS
    }
    n_asked = len(gateway.engine.requests)
    assert n_asked == len(GROUPS)
    assert run_scenes(gateway, tmp_path) == 0
    assert len(gateway.engine.requests) == n_asked
    told = capsys.readouterr()
    assert "5 of 5 targets reached." in told.out
    assert "multi-image points F1" in told.out
    assert max(len(line) for line in told.out.splitlines()) <= 80
    assert f"log: {tmp_path}" in told.err


def test_a_poor_engine_is_measured_and_only_fails_a_check(
    gateway: RunningGateway, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    oracle_of(gateway).default = '<points coords="1 1 001 001 2 999 999">x</points>'
    options = ("--group", "image points", "--group", "none")
    assert run_scenes(gateway, tmp_path, *options) == 0
    told = capsys.readouterr()
    assert "0 of 2 targets reached." in told.out
    assert "scenes: 2 of 2" in told.err
    assert run_scenes(gateway, tmp_path, *options, "--check") == 1
    assert "below target: image points, none" in capsys.readouterr().err
    (log,) = tmp_path.glob("scenes-3-small-*.jsonl")
    lines = [json.loads(line) for line in log.read_text().splitlines()[1:]]
    assert {line["verb"] for line in lines} == {"point"}
    assert all(line["asked"] and line["text"] for line in lines)


def test_tasks_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "list"]) == 0
    assert "image points: point to all of a kind (f1, target 0.90)" in capsys.readouterr().out
    assert main(["eval", "list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"scenes": [group.name for group in GROUPS]}


@pytest.mark.parametrize(
    ("tokens", "code", "message"),
    [
        (["scense"], 2, "did you mean scenes?"),
        (["scenes", "--group", "nones"], 2, "scenes has no group nones; choose of: image points"),
        (["scenes", "--n", "0"], 2, "--n is 0"),
        (["scenes", "--sed", "1"], 2, "--sed"),
        (["scenes", "--server", "http://127.0.0.1:9"], 3, "start it with `molmo serve`"),
        (["scenes", "--server", "ftp://x"], 2, "http://HOST:PORT"),
    ],
)
def test_what_goes_wrong_is_told(
    tokens: list[str],
    code: int,
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("molmo_evals.commands._PATIENT", RetryPolicy(n_retries=0))
    assert main(["eval", "run", *tokens]) == code
    told = capsys.readouterr()
    assert message in told.err
    assert told.out == ""
    assert list(tmp_path.iterdir()) == []


def gate(gateway: RunningGateway, folder: Path, *more: str) -> int:
    options = ["--n", "1", "--seed", str(SEED), "--folder", str(folder), "--group", "none", *more]
    return main(["eval", "gate", "scenes", "--server", gateway.url, *options])


def test_a_gate_compares_two_models_of_a_server(
    gateway: RunningGateway,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One engine answers under both names; it forgets what it knew between them."""
    learn_all(gateway, folder, 1)
    checkpoint = read_checkpoint(folder).id
    names = ("--candidate", checkpoint, "--current", "molmo2")
    assert gate(gateway, tmp_path / "equal", *names) == 0
    assert capsys.readouterr().out.count("none accuracy") == 2
    oracle_of(gateway).forgets_after = len(gateway.engine.requests) + 1
    monkeypatch.setenv("MOLMO_GATE_CANDIDATE", checkpoint)
    monkeypatch.setenv("MOLMO_GATE_CURRENT", "molmo2")
    assert gate(gateway, tmp_path / "worse") == 1
    why = capsys.readouterr().err
    assert f"{checkpoint} is worse than molmo2 by more than 0.02: none 1.000 -> 0.000" in why
    assert gate(gateway, tmp_path / "worse", "--tolerance", "1") == 0  # from the log
