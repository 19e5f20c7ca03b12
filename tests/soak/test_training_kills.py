"""A training that is killed a hundred times: at every touch of its folder, and at any time."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from molmo_training.runs.run_state import RunState
from tests.support.ranks import process
from tests.support.toy_run import curve, go_on, killed_at

N_KILLS, MOST_STEPS = 100, 400
LONGEST_S = 1.0


@pytest.mark.soak
def test_a_training_survives_a_hundred_kills(tmp_path: Path, show: Callable[..., None]) -> None:
    draws, expected = random.Random(3), curve(MOST_STEPS)
    state, last, n_amid = RunState(tmp_path), 0, 0
    for kill in range(N_KILLS):
        by_touch = kill % 2 == 0
        child = process(killed_at, tmp_path, MOST_STEPS, 20 + kill if by_touch else 0)
        child.join(None if by_touch else draws.uniform(0, LONGEST_S))
        child.kill()
        child.join()
        assert child.exitcode == -signal.SIGKILL
        n_amid += any(path.name.startswith(".") for path in tmp_path.iterdir())
        if (saved := state.saved()) is not None:
            assert saved.step >= last
            assert saved.progress["losses"] == expected[: saved.step]
            last = saved.step
    state.close()
    show(f"{N_KILLS} kills, {n_amid} amid a save; {last} steps saved, none lost or wrong")
    assert n_amid > N_KILLS // 4
    n_more = last + 5
    assert go_on(tmp_path, n_more).losses == curve(n_more)
