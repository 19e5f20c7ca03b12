"""How log lines are written.

Knows: formats and whose lines they are. Does not know: what is logged. Nobody logs prompts, media,
answers or headers of callers; of an API key only its first letters and whose it is.
"""

from __future__ import annotations

import logging
import queue
import sys
import time
from datetime import UTC, datetime
from logging.handlers import QueueHandler, QueueListener

import structlog

_MAX_WAITING = 10_000
"""Lines; of more than nobody reads in time the number is told and no more."""
_LAST_LINES_S = 1.0


def configure_logging(level: str) -> None:
    """JSON lines on standard error (plain on a terminal): this package, web server, traces."""
    renderer: structlog.typing.Processor = structlog.processors.JSONRenderer()
    if sys.stderr.isatty():
        renderer = structlog.dev.ConsoleRenderer(pad_event_to=0)
    writing = logging.StreamHandler()
    writing.setFormatter(line_format(renderer))
    handler = WrittenBehind(writing)
    for name in ("molmo_server", "uvicorn", "opentelemetry"):
        named = logging.getLogger(name)
        named.handlers, named.propagate = [handler], False
        named.setLevel(level.upper() if name == "molmo_server" else logging.WARNING)


def line_format(renderer: structlog.typing.Processor) -> logging.Formatter:
    return structlog.stdlib.ProcessorFormatter(
        processors=[
            structlog.stdlib.add_log_level,
            structlog.stdlib.add_logger_name,
            _add_time,
            structlog.stdlib.ExtraAdder(),
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            structlog.processors.format_exc_info,
            renderer,
        ],
    )


def _add_time(_: object, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """When it was said, however late it is written."""
    said = datetime.fromtimestamp(event["_record"].created, UTC)
    event["timestamp"] = f"{said:%Y-%m-%dT%H:%M:%S.%fZ}"
    return event


class WrittenBehind(QueueHandler):
    """Has lines written by a thread: whoever does not read them cannot hold up the service."""

    queue: queue.Queue[logging.LogRecord]

    def __init__(self, writing: logging.Handler, *, max_waiting: int = _MAX_WAITING) -> None:
        super().__init__(queue.Queue(max_waiting))
        self._n_lost = 0
        QueueListener(self.queue, writing).start()

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        return record  # it stays in this process

    def enqueue(self, record: logging.LogRecord) -> None:
        try:
            self.queue.put_nowait(record)
        except queue.Full:
            self._n_lost += 1
            return
        if self._n_lost:
            facts = {"name": __name__, "levelno": logging.WARNING, "levelname": "WARNING"}
            n_lost, self._n_lost = self._n_lost, 0
            told = logging.makeLogRecord({**facts, "msg": f"{n_lost} lines of the log were lost"})
            self.enqueue(told)

    def flush(self) -> None:
        """Called at the end of the process: the last lines are waited for, not for ever."""
        end = time.monotonic() + _LAST_LINES_S
        while self.queue.unfinished_tasks and time.monotonic() < end:
            time.sleep(0.01)
