"""How answers that come in pieces are announced.

Knows: headers of event streams. Does not know: events.
"""

from __future__ import annotations

STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # proxies must not collect events
]
