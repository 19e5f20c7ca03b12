"""How log lines are written.

Knows: formats and whose lines they are. Does not know: what is logged. Nobody logs prompts, media,
answers or headers of callers; of an API key only its first letters and whose it is.
"""

from __future__ import annotations

import logging
import sys

import structlog


def configure_logging(level: str) -> None:
    """JSON lines on standard error (plain on a terminal): this package, web server, traces."""
    renderer: structlog.typing.Processor = structlog.processors.JSONRenderer()
    if sys.stderr.isatty():
        renderer = structlog.dev.ConsoleRenderer(pad_event_to=0)
    formatter = structlog.stdlib.ProcessorFormatter(
        processors=[
            structlog.stdlib.add_log_level,
            structlog.stdlib.add_logger_name,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.stdlib.ExtraAdder(),
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            structlog.processors.format_exc_info,
            renderer,
        ],
    )
    handler = logging.StreamHandler()
    handler.setFormatter(formatter)
    for name in ("molmo_server", "uvicorn", "opentelemetry"):
        named = logging.getLogger(name)
        named.handlers, named.propagate = [handler], False
        named.setLevel(level.upper() if name == "molmo_server" else logging.WARNING)
