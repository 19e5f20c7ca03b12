"""Lines of the log are written behind the service's back."""

from __future__ import annotations

import logging
import threading

import orjson
import structlog

from molmo_server.telemetry.logs import WrittenBehind, line_format


class Slow(logging.Handler):
    """Writes nothing before it may."""

    def __init__(self) -> None:
        super().__init__()
        self.may = threading.Event()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        assert self.may.wait(30)
        self.lines.append(record.getMessage())


def say(handler: WrittenBehind, text: str) -> None:
    handler.handle(logging.makeLogRecord({"msg": text}))


def test_who_does_not_read_holds_up_nobody_and_is_told_what_was_lost() -> None:
    slow = Slow()
    handler = WrittenBehind(slow, max_waiting=3)
    for number in range(10):
        say(handler, f"line {number}")
    slow.may.set()
    handler.flush()
    say(handler, "later")
    handler.flush()

    # One more where the thread had taken the first before the queue was full.
    n_kept = len(slow.lines) - 2
    assert n_kept in (3, 4)
    assert slow.lines[:3] == ["line 0", "line 1", "line 2"]
    assert slow.lines[-2:] == ["later", f"{10 - n_kept} lines of the log were lost"]


def test_the_end_waits_for_the_last_lines_not_for_ever() -> None:
    slow = Slow()
    handler = WrittenBehind(slow)
    say(handler, "never read")
    handler.flush()
    assert slow.lines == []

    slow.may.set()
    handler.flush()
    assert slow.lines == ["never read"]


def test_a_line_tells_when_it_was_said_not_when_it_was_written() -> None:
    record = logging.makeLogRecord({"msg": "hello", "created": 1_800_000_000.25, "status": 200})
    line = orjson.loads(line_format(structlog.processors.JSONRenderer()).format(record))
    assert (line["event"], line["status"]) == ("hello", 200)
    assert line["timestamp"] == "2027-01-15T08:00:00.250000Z"
