"""What several ranks agree on: states that any number of them goes on from, failures, ends."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch.distributed as dist

from molmo_core.errors import TrainingError
from molmo_training.runs import run_state, tensors
from molmo_training.runs.run_state import RunState
from molmo_training.runs.stopping import Stopping
from tests.support.ranks import run_ranks
from tests.support.toy_run import ToyRun, curve, go_on

N_STEPS = 8
CURVE = curve(N_STEPS)


def test_a_run_goes_on_with_more_and_with_fewer_ranks(tmp_path: Path) -> None:
    assert go_on(tmp_path / "one", 4).losses == CURVE[:4]
    run_ranks(2, _in_two, tmp_path)
    assert go_on(tmp_path / "two", N_STEPS).losses == CURVE
    written = {path.name for path in (tmp_path / "one" / "step9" / "tensors").iterdir()}
    assert written == {".metadata", "__0_0.distcp", "__1_0.distcp"}


def _in_two(folder: Path) -> None:
    """One start of processes for all that needs two of them."""
    rank = dist.get_rank()
    assert go_on(folder / "two", 4, rank=rank, world_size=2).losses == CURVE[:4]
    run = go_on(folder / "one", N_STEPS, rank=rank, world_size=2)
    assert run.losses == CURVE
    run.advance(1)
    state = RunState(folder / "one")
    _check_that_all_hear_of_what_one_cannot_do(run, state)
    _check_that_all_hear_of_a_full_disk(run, state)
    _check_that_all_end(rank)


def _check_that_all_hear_of_what_one_cannot_do(run: ToyRun, state: RunState) -> None:
    """Between what ranks do together, in the order of a save and a restoring."""
    with _failing_on_second(run, run_state, "random_state"), pytest.raises(OSError, match="stale"):
        run.save(state)
    with _failing_on_second(run, run_state, "_files_of"):
        run.save(state)
        with pytest.raises(TrainingError, match=r"step 9 is not saved .*stale .*that of step 8"):
            state.wait()
    for home, name in ((run_state.folders, "read_json"), (tensors._Reader, "tensors")):
        with _failing_on_second(run, home, name), pytest.raises(OSError, match="stale"):
            state.restore(model=run.model, optimizers=run.optimizers)


@contextmanager
def _failing_on_second(run: ToyRun, home: object, name: str) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if run.rank == 1:
            patch.setattr(home, name, _stale)
        yield


def _stale(*_: object) -> object:
    raise OSError(errno.ESTALE, "stale file handle")


def _check_that_all_hear_of_a_full_disk(run: ToyRun, state: RunState) -> None:
    room = tensors.Writer
    if run.rank == 1:
        tensors.Writer = _NoRoom
    run.save(state)
    with pytest.raises(TrainingError, match=r"step 9 is not saved, the disk .* that of step 8"):
        state.wait()
    tensors.Writer = room
    run.save(state)
    state.close()


def _check_that_all_end(rank: int) -> None:
    with Stopping() as stopping:
        assert not stopping.agreed()
        if rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        assert stopping.agreed()
        assert (stopping.reason is None) == (rank == 0)


class _NoRoom(tensors.Writer):
    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.fs.create_stream = _no_room


def _no_room(path: Path, mode: str) -> object:
    Path(path).write_bytes(b"the beginning")
    raise OSError(errno.ENOSPC, "No space left on device")
