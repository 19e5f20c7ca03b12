"""Figures of a run: rates, a line on the console, a log that goes on, trackers when asked."""

from __future__ import annotations

import io
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from molmo_core.errors import TrainingError
from molmo_training.runs.log import LOG_FILE, JsonLines, append_figures, read_figures
from molmo_training.runs.meters import Console, Meters, memory_bytes
from molmo_training.runs.trackers import WandbConfig, open_sinks


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class Kept:
    def __init__(self) -> None:
        self.lines: list[dict[str, float]] = []

    def write(self, line: dict[str, float]) -> None:
        self.lines.append(line)

    def close(self) -> None:
        self.lines.append({})


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_rates_are_of_training_and_what_is_left_is_of_everything() -> None:
    clock, kept = Clock(), Kept()
    meters = Meters([kept], max_steps=110, first_step=100, clock=clock)
    meters.count(300)
    meters.count(200)
    clock.now_s = 2.0
    with meters.aside():
        clock.now_s = 5.0
    line = meters.log(102, {"loss": 1.23456789, "examples": 12345678})
    assert line["tokens_per_s"] == 250.0
    assert line["left_s"] == 20.0  # 2 steps took 5 s, 8 are left
    assert (line["loss"], line["examples"], line["step"]) == (1.23457, 12345678, 102)
    assert 0.01 < line["memory_gb"] == round(memory_bytes() / 1e9, 3)
    clock.now_s = 6.0
    assert "tokens_per_s" not in meters.log(110, {})
    meters.write(110, {"validation/loss": 2.0})
    meters.close()
    assert kept.lines[0] == line
    assert kept.lines[-2:] == [{"step": 110, "validation/loss": 2.0}, {}]


@pytest.mark.parametrize(
    ("left_s", "told"),
    [(4.4, "4 s"), (125, "2 min 05 s"), (7502, "2 h 05 min"), (100_000, "1 d 03 h")],
)
def test_the_console_tells_a_step_in_a_line(left_s: float, told: str) -> None:
    stream = io.StringIO()
    console = Console(max_steps=400, stream=stream)
    rates = {"tokens_per_s": 5120.4, "left_s": left_s, "memory_gb": 3.14}
    console.write({"step": 20, "loss": 1.23456, "accuracy": 0.5, **rates})
    console.write({"step": 20, "validation/loss": 2})
    console.close()
    assert stream.getvalue() == (
        f"step 20/400  loss 1.2346  5120 tokens/s  {told} left  3.1 GB\n"
        "step 20/400  validation/loss 2.0000\n"
    )


def test_a_terminal_draws_the_line_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "12")
    stream = Terminal()
    console = Console(max_steps=400, stream=stream)
    console.write({"step": 1, "loss": 1.0})
    console.write({"step": 2, "loss": 1.0})
    console.close()
    assert stream.getvalue() == "\r\x1b[2Kstep 1/400 \r\x1b[2Kstep 2/400 \n"


def test_a_run_that_goes_on_logs_again_what_was_lost(tmp_path: Path) -> None:
    append_figures(tmp_path, {"tower_step": 9})
    log = JsonLines(tmp_path)
    for step in (1, 2, 3):
        log.write({"step": step, "loss": float("inf")})
    with (tmp_path / LOG_FILE).open("a") as file:
        file.write('{"step": 4, "lo')  # killed here
    assert [line.get("step") for line in read_figures(tmp_path)] == [None, 1, 2, 3]
    open_sinks(tmp_path, max_steps=9, first_step=2, tensorboard=False)
    lines = [json.loads(line) for line in (tmp_path / LOG_FILE).read_text().splitlines()]
    assert lines == [{"tower_step": 9}, {"step": 1, "loss": None}, {"step": 2, "loss": None}]
    assert read_figures(tmp_path / "none") == []


class Library(types.ModuleType):
    """Stands in for TensorBoard and Weights & Biases: notes what it is told."""

    Error = RuntimeError

    def __init__(self) -> None:
        super().__init__("library")
        self.told: list[Any] = []

    def SummaryWriter(self, folder: Path, purge_step: int) -> Library:
        self.told.append((folder.name, purge_step))
        return self

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.told.append((name, value, step))

    def flush(self) -> None: ...

    def init(self, **options: Any) -> Library:
        if options["project"] == "closed":
            raise self.Error("no API key")
        self.told.append((options["project"], options["id"], options["config"]))
        return self

    def log(self, figures: dict[str, float], step: int) -> None:
        self.told.append((figures, step))

    def close(self) -> None:
        self.told.append("closed")

    finish = close


def test_tensorboard_is_written_where_it_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = Library()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", library)
    meters = Meters(open_sinks(tmp_path, max_steps=9, first_step=4), max_steps=9)
    meters.write(5, {"loss": 1.5})
    meters.close()
    assert library.told == [("tensorboard", 5), ("loss", 1.5, 5), "closed"]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert len(open_sinks(tmp_path, max_steps=9)) == 2
    with pytest.raises(TrainingError, match="TensorBoard is asked for and not installed"):
        open_sinks(tmp_path, max_steps=9, tensorboard=True)


def test_weights_and_biases_is_asked_for_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = Library()
    monkeypatch.setitem(sys.modules, "wandb", library)
    wanted = {"tensorboard": False, "wandb": WandbConfig(project="mine"), "config": {"rate": 1}}
    for step in (1, 2):
        *_, tracker = open_sinks(tmp_path, max_steps=9, **wanted)
        tracker.write({"step": step, "loss": 2.0})
        tracker.close()
    name = library.told[0][1]
    told = [("mine", name, {"rate": 1}), ({"loss": 2.0}, 1), "closed"]
    assert library.told == [*told, told[0], ({"loss": 2.0}, 2), "closed"]
    with pytest.raises(TrainingError, match=r"cannot be used \(no API key\); log in with `wandb"):
        open_sinks(tmp_path, max_steps=9, tensorboard=False, wandb=WandbConfig(project="closed"))
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(TrainingError, match="Weights & Biases is asked for and not installed"):
        open_sinks(tmp_path, max_steps=9, **wanted)
