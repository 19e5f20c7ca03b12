"""Killed at any moment of a save, a run has a whole state and goes on to the same end."""

from __future__ import annotations

import random
import signal
from pathlib import Path

from molmo_training.runs.run_state import RunState
from tests.support.ranks import process
from tests.support.toy_run import curve, go_on, killed_at

N_STEPS, N_KILLS = 20, 10
TOUCHES_A_SAVE = 60


def test_a_run_survives_kills_at_any_moment_of_a_save(tmp_path: Path) -> None:
    draws, expected = random.Random(8), curve(N_STEPS)
    state, last = RunState(tmp_path), 0
    n_partial = 0
    for _ in range(N_KILLS):
        child = process(killed_at, tmp_path, N_STEPS, draws.randint(10, 2 * TOUCHES_A_SAVE))
        child.join()
        assert child.exitcode == -signal.SIGKILL
        n_partial += any(path.name.startswith(".") for path in tmp_path.iterdir())
        saved = state.saved()
        if saved is not None:
            assert saved.step >= last
            assert saved.progress["losses"] == expected[: saved.step]
            last = saved.step
    assert last > 0
    assert n_partial > N_KILLS // 3  # most of them hit a save
    state.close()
    assert go_on(tmp_path, N_STEPS).losses == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step19", "step20"]
