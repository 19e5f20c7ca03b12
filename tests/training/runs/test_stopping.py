"""Requests to end a run: noted once, obeyed at once when repeated."""

from __future__ import annotations

import os
import signal
from itertools import islice
from multiprocessing import Pipe
from multiprocessing.connection import Connection

import pytest
import torch
from torch.utils.data import IterableDataset

from molmo_training.data.loader import make_loader
from molmo_training.runs.stopping import SIGNALS, Stopping
from tests.support.ranks import process


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_noted_and_the_handlers_come_back(
    number: signal.Signals, caplog: pytest.LogCaptureFixture
) -> None:
    before = [signal.getsignal(each) for each in SIGNALS]
    caplog.set_level("INFO")
    with Stopping() as stopping:
        assert not stopping.agreed()
        signal.raise_signal(number)
        signal.raise_signal(signal.SIGTERM)  # at once: a launcher passes it on
        assert stopping.agreed()
        assert stopping.reason == number.name
    assert f"the run ends after this step: {number.name}" in caplog.text
    assert [signal.getsignal(each) for each in SIGNALS] == before


def test_time_is_a_reason_to_end() -> None:
    clock = Clock()
    stopping = Stopping(time_limit_s=90, clock=clock)
    clock.now_s = 89.9
    assert not stopping.agreed()
    clock.now_s = 90.0
    assert stopping.agreed()
    assert stopping.reason == "the time limit of 90 s"


def _run(ready: Connection) -> None:
    with Stopping(one_request_s=0) as stopping:
        ready.send("ready")
        while not stopping.agreed():
            pass
        ready.send(stopping.reason)
        while True:  # a pause could begin between a signal and its handler
            pass


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_second_signal_ends_at_once(number: signal.Signals, code: int) -> None:
    ready, is_ready = Pipe(duplex=False)
    child = process(_run, is_ready)
    assert ready.recv() == "ready"
    os.kill(child.pid, number)
    assert ready.recv() == number.name
    os.kill(child.pid, number)
    child.join()
    assert child.exitcode == code


def _fork(ended: Connection) -> None:
    ready, is_ready = os.pipe()
    with Stopping():
        child = os.fork()
        if child == 0:
            os.write(is_ready, b"!")
            while True:  # a pause could begin between a signal and its handler
                pass
        os.read(ready, 1)
        os.kill(child, signal.SIGINT)  # from a terminal: every process gets it
        os.kill(child, signal.SIGTERM)
        ended.send(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


def test_a_forked_child_can_still_be_ended() -> None:
    ended, is_ended = Pipe(duplex=False)
    process(_fork, is_ended).join()
    assert ended.recv() == -signal.SIGTERM


class _Numbers(IterableDataset[int]):
    def __iter__(self):
        yield from range(8)


def test_workers_of_a_loader_leave_signals_to_the_trainer() -> None:
    numbers = iter(make_loader(_Numbers(), n_workers=1, n_prefetched=1))
    assert next(numbers) == 0
    for worker in numbers._workers:
        os.kill(worker.pid, signal.SIGTERM)
        os.kill(worker.pid, signal.SIGINT)
    assert list(islice(numbers, 7)) == list(range(1, 8))
    state = torch.get_rng_state()
    assert next(iter(make_loader(_Numbers(), n_workers=0))) == 0
    assert torch.equal(torch.get_rng_state(), state)
