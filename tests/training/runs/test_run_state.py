"""A run goes on as if nothing had been, whatever ended it."""

from __future__ import annotations

import errno
import json
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from molmo_core.errors import CheckpointError, TrainingError
from molmo_training.runs import step_folder, tensors
from molmo_training.runs.run_state import RunState, merged
from tests.support.toy_run import CONFIG, ToyRun, curve, go_on

N_STEPS = 8
CURVE = curve(N_STEPS)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@settings(max_examples=6, deadline=None, derandomize=True)
@given(step=st.integers(1, N_STEPS - 1), is_async=st.booleans(), dropout=st.sampled_from([0, 0.3]))
def test_a_run_goes_on_at_any_step_as_if_never_stopped(
    tmp_path_factory: pytest.TempPathFactory, step: int, is_async: bool, dropout: float
) -> None:
    whole = ToyRun(dropout=dropout)
    whole.advance(N_STEPS)
    first = ToyRun(dropout=dropout)
    first.advance(step)
    state = RunState(tmp_path_factory.mktemp("run"), is_async=is_async)
    first.save(state)
    first.advance(2)  # goes on while the state is written
    state.wait()
    second = ToyRun(seed=9, dropout=dropout)
    second.advance(1)  # what it has of its own is forgotten
    assert second.restore(state)
    second.batches.clear()
    second.advance(N_STEPS - step)
    assert second.losses == whole.losses
    seen = whole.batches[-len(second.batches) :]
    assert all(map(torch.equal, second.batches, seen))
    ours, theirs = second.model.state_dict(), whole.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    rates = [[g["lr"] for o in run.optimizers for g in o.param_groups] for run in (second, whole)]
    assert rates[0] == rates[1]
    assert not second.optimizers[0].state.get(second.model.idle.weight)
    state.close()


def test_there_is_nothing_to_go_on_from_at_first(tmp_path: Path) -> None:
    state, run = RunState(tmp_path / "run"), ToyRun()
    assert state.latest() is None
    assert state.saved() is None
    assert not run.restore(state)
    with pytest.raises(CheckpointError, match=r"no whole state of step 4 .* those of steps \[\]"):
        state.saved(4)
    state.close()


def test_the_newest_states_stay_and_hold_no_pickle_of_ours(tmp_path: Path) -> None:
    assert go_on(tmp_path, 5).losses == CURVE[:5]
    assert names(tmp_path) == {"step4", "step5"}
    state = RunState(tmp_path)
    saved = state.saved()
    assert saved is not None
    assert (saved.step, saved.config, saved.world_size) == (5, CONFIG, 1)
    assert saved.progress == {"step": 5, "losses": CURVE[:5]}
    for path in saved.folder.glob("*.json"):
        json.loads(path.read_text())
    assert names(saved.folder / "tensors") == {".metadata", "__0_0.distcp"}
    assert go_on(tmp_path, N_STEPS).losses == CURVE
    state.close()


@pytest.mark.parametrize("harm", ["cut", "missing", "without list"])
def test_a_state_that_was_cut_is_no_state(
    tmp_path: Path, harm: str, caplog: pytest.LogCaptureFixture
) -> None:
    go_on(tmp_path, 4)
    harmed = tmp_path / "step4"
    if harm == "cut":
        file = harmed / "tensors" / "__0_0.distcp"
        file.write_bytes(file.read_bytes()[:-1])
    elif harm == "missing":
        (harmed / "data.json").unlink()
    else:
        (harmed / "complete.json").unlink()
    state = RunState(tmp_path)
    assert state.latest() == 3
    assert "step4 is left out, it is no whole state" in caplog.text
    with pytest.raises(CheckpointError, match=r"no whole state of step 4"):
        state.restore(model=ToyRun().model, step=4)
    assert go_on(tmp_path, N_STEPS).losses == CURVE  # step 4 is written anew
    state.close()


def test_states_of_a_later_course_are_not_written_over(tmp_path: Path) -> None:
    go_on(tmp_path, 4)
    state, run = RunState(tmp_path, keep=3), ToyRun(seed=9)
    run.restore(state, step=3)
    run.save(state)  # is there already
    run.advance(1)
    with pytest.raises(TrainingError, match=r"step 4 .* has a state of step 4: .*discard_after"):
        run.save(state)
    state.discard_after(3)
    run.save(state)
    state.close()
    assert names(tmp_path) == {"step3", "step4"}


def test_weights_alone_can_be_restored(tmp_path: Path) -> None:
    run = go_on(tmp_path, 2)
    state, other = RunState(tmp_path), ToyRun(seed=9)
    assert state.restore(model=other.model) is not None
    assert torch.equal(other.model.head.weight, run.model.head.weight)
    assert not other.optimizers[0].state
    state.close()


def test_what_stands_beside_the_model_is_saved_with_it(tmp_path: Path) -> None:
    run, probe = ToyRun(), torch.nn.Linear(2, 2)
    state = RunState(tmp_path)
    documents = {"data": {"batch": 3}, "progress": {}, "config": {}}
    with pytest.raises(TrainingError, match=r"parameters \[\(2, 2\), \(2,\)\] of neither module"):
        state.save(1, model=run.model, optimizers=[_adamw(probe)], **documents)
    state.save(1, model=run.model, beside=probe, optimizers=[_adamw(probe)], **documents)
    other = torch.nn.Linear(2, 2)
    saved = state.restore(model=ToyRun().model, beside=other, optimizers=[_adamw(other)])
    assert saved is not None
    assert saved.data == {"batch": 3}
    assert torch.equal(other.weight, probe.weight)
    state.close()


def test_wrappers_and_tied_weights_change_no_names(tmp_path: Path) -> None:
    run, other = ToyRun(), ToyRun(seed=9)
    for each in (run, other):
        each.model.head.weight = torch.nn.Parameter(each.model.words.weight.T.clone().T)
        each.model.words.weight = each.model.head.weight
    run.model.layer = torch.compile(run.model.layer, backend="eager")
    run.model.dropout = checkpoint_wrapper(run.model.idle)
    optimizer = _adamw(run.model)
    run.model.head.weight.grad = torch.ones_like(run.model.head.weight)
    optimizer.step()
    state = RunState(tmp_path)
    documents = {"data": {}, "progress": {}, "config": {}}
    state.save(
        1, model=torch.compile(run.model, backend="eager"), optimizers=[optimizer], **documents
    )
    other.model.dropout = other.model.idle
    restored = _adamw(other.model)
    state.restore(model=other.model, optimizers=[restored])
    assert other.model.words.weight is other.model.head.weight
    assert torch.equal(other.model.words.weight, run.model.words.weight)
    assert torch.equal(other.model.layer.weight, run.model.layer.weight)
    assert list(restored.state) == [other.model.head.weight]
    assert restored.state[other.model.head.weight]["exp_avg"].mean().item() == pytest.approx(0.1)
    state.close()


def _adamw(module: torch.nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(module.parameters())


def test_another_model_or_other_groups_are_refused(tmp_path: Path) -> None:
    go_on(tmp_path, 1)
    state, run = RunState(tmp_path), ToyRun()
    run.model.head = torch.nn.Linear(16, 8)
    with pytest.raises(
        CheckpointError,
        match=r"another model: missing: model.head.bias .* \(32, 16\), expected \(8, 16\)",
    ):
        state.restore(model=run.model)
    run = ToyRun()
    with pytest.raises(
        CheckpointError, match=r"groups of \[\[1, 4\], \[1\]\] parameters, .*\[\[6\]\]"
    ):
        state.restore(model=run.model, optimizers=[_adamw(run.model)])
    state.close()


def test_a_table_of_contents_runs_nothing(tmp_path: Path) -> None:
    go_on(tmp_path, 1)
    table = tmp_path / "step1" / "tensors" / ".metadata"
    harmful = b"cos\nsystem\n(S'true'\ntR."
    table.write_bytes(harmful + b" " * (table.stat().st_size - len(harmful)))
    state = RunState(tmp_path)
    with pytest.raises(CheckpointError, match=r"it names os\.system, which no table needs"):
        ToyRun().restore(state)
    state.close()


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Writes through torch fail as long as the list holds something."""
    full = ["yes"]
    write = tensors.Writer

    def refuse(*arguments: object, **options: object) -> object:
        writer = write(*arguments, **options)
        if full:
            writer.fs.create_stream = _no_room
        return writer

    monkeypatch.setattr(tensors, "Writer", refuse)
    return full


def _no_room(path: Path, mode: str) -> object:
    Path(path).write_bytes(b"the beginning")
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_leaves_the_state_before(tmp_path: Path, full_disk: list[str]) -> None:
    full_disk.clear()
    run = go_on(tmp_path, 2)
    full_disk.append("yes")
    state = RunState(tmp_path, keep=2)
    run.restore(state)
    run.advance(1)
    run.save(state)
    run.advance(1)
    with pytest.raises(
        TrainingError, match=r"step 3 is not saved, the disk of .* is full; that of step 2 stands"
    ):
        run.save(state)
    assert names(tmp_path) == {"step1", "step2"}
    full_disk.clear()
    run.save(state)
    state.close()
    assert go_on(tmp_path, N_STEPS).losses == CURVE


def test_room_for_a_state_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, state = ToyRun(), RunState(tmp_path / "run")
    n_numbers = sum(parameter.numel() for parameter in run.model.parameters())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=3 * 4 * n_numbers))
    state.check_room(model=run.model, optimizers=run.optimizers)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=3 * 4 * n_numbers - 1))
    with pytest.raises(TrainingError, match=r"a state takes about 0.00 GB, 0.00 GB are free"):
        state.check_room(model=run.model, optimizers=run.optimizers)
    state.check_room(model=run.model)
    state.close()


def test_data_states_that_are_not_those_of_lanes_have_to_be_the_same() -> None:
    assert merged([{"batch": 3}, {"batch": 3}]) == {"batch": 3}
    assert merged([{"lanes": {"0": 1}}, {"lanes": {"1": 2}}]) == {"lanes": {"0": 1, "1": 2}}
    with pytest.raises(TrainingError, match="data states of the ranks differ and have no lanes"):
        merged([{"batch": 3}, {"batch": 4}])


def test_documents_that_find_no_room_are_no_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    run, state = ToyRun(), RunState(tmp_path)
    monkeypatch.setattr(step_folder, "_sync_folder", no_room)
    run.save(state)
    with pytest.raises(TrainingError, match=r"step 0 is not saved, .*no state is there yet"):
        state.wait()
    state.wait()  # told once
    assert names(tmp_path) == set()
    state.close()


def test_a_new_state_is_announced_before_older_ones_go(tmp_path: Path) -> None:
    seen = []

    def announced(folder: Path) -> None:
        assert threading.current_thread() is not threading.main_thread()
        seen.append((folder.name, names(tmp_path)))
        if folder.name == "step3":
            raise ValueError("nobody listens")

    run, state = ToyRun(), RunState(tmp_path, keep=1, on_saved=announced)
    for _ in range(3):
        run.advance(1)
        run.save(state)
    with pytest.raises(TrainingError, match=r"step3 is saved; .* failed .*ValueError: nobody li"):
        state.close()
    assert seen == [
        ("step1", {"step1"}),
        ("step2", {"step1", "step2"}),
        ("step3", {"step2", "step3"}),
    ]
    assert RunState(tmp_path).latest() == 3


def test_a_failure_of_what_follows_loses_no_state(tmp_path: Path) -> None:
    def fails(_: Path) -> None:
        raise OSError(errno.EIO, "the store is away")

    run, state = ToyRun(), RunState(tmp_path, keep=1, on_saved=fails)
    for _ in range(2):
        run.advance(1)
        run.save(state)
        with pytest.raises(TrainingError, match=r"step\d is saved; what was to follow"):
            state.wait()
    assert step_folder.whole_steps(tmp_path) == [2]
    run.save(state)  # again, as at the end of a run: the step stands already
    state.wait()
    state.close()
