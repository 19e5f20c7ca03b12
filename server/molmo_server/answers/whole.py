"""An engine's whole answer, read and seen to be one.

Knows: what every completion has. Does not know: what it says.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import orjson

from molmo_core.errors import EngineFailed
from molmo_server.engine_pool import EngineReply


def chat_completion(reply: EngineReply) -> dict[str, Any]:
    """Raises EngineFailed for anything else."""
    return _whole(reply, texts_of)


def text_completion(reply: EngineReply) -> dict[str, Any]:
    """Raises EngineFailed for anything else."""
    return _whole(reply, lambda answer: [choice["text"] for choice in answer["choices"]])


def texts_of(answer: dict[str, Any]) -> list[str]:
    """Of a chat completion."""
    return [choice["message"]["content"] for choice in answer["choices"]]


def _whole(reply: EngineReply, texts: Callable[[dict[str, Any]], list[str]]) -> dict[str, Any]:
    try:
        answer: dict[str, Any] = orjson.loads(reply.first)
        texts(answer), answer["usage"]
    except (orjson.JSONDecodeError, KeyError, TypeError) as error:
        raise EngineFailed("the engine's answer was no completion; send it again") from error
    return answer
