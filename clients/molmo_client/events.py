"""The events of a streamed verb: places as they are written, and at last the whole answer.

Knows: server-sent events, the server's error event. Does not know: how a request is sent.
Source: `molmo_core.api`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from molmo_client.calls import Call
from molmo_client.failures import RequestFailed, failure_of
from molmo_core import api

_PREFIX = "data: "
_LAST = "[DONE]"
_BROKEN_OFF = 502
"""The status that an error has when the answer had begun and the server did not tell."""


class VerbEvents:
    """Feed the lines of a stream; each yields what has come with it."""

    def __init__(self, call: Call[Any]) -> None:
        self._call = call
        self._is_complete = False

    def feed(self, line: str) -> Iterator[api.Observation | api.PointingAnswer]:
        """Raises the error that an event tells of."""
        if not line.startswith(_PREFIX) or line == _PREFIX + _LAST:
            return
        content: dict[str, Any] = json.loads(line[len(_PREFIX) :])
        if "error" in content:
            raise failure_of(_BROKEN_OFF, {}, line[len(_PREFIX) :].encode())
        if content.get("op") == "add":
            yield api.Observation.model_validate(content["item"])
        elif content.get("op") == "done":
            self._is_complete = True
            yield self._call.answer_type.model_validate(content["answer"])

    def check_end(self) -> None:
        """Raises RequestFailed when the stream ended without the whole answer."""
        if not self._is_complete:
            raise RequestFailed("the stream ended in the middle of the answer; ask again")
