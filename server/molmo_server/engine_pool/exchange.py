"""One request to an engine: what comes back, and what each failure means.

Knows: vLLM's endpoints, its error bodies. Does not know: sockets (`answer`), health, processes,
callers.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Self

import orjson

from molmo_core.errors import EngineFailed, EngineRefused, EngineUnavailable
from molmo_server.engine_pool.answer import LOST, Answer

logger = logging.getLogger(__name__)

CHAT_PATH = "/v1/chat/completions"
COMPLETIONS_PATH = "/v1/completions"
WEIGHTS_PATH = "/molmo/weights"
"""Of our own control plugin inside the engine (`engine.control`)."""
_MEMORY_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
_MAX_ERROR_CHARS = 600
_LAST_BYTES_S = 0.2


@dataclass(kw_only=True)
class EngineReply:
    """A 200 of which the first bytes have arrived, as long as its block: an engine drops what was
    not read until then."""

    first: bytes
    answer: Answer = field(repr=False)
    checkpoint_id: str = ""
    """Whose weights answer; requests in flight end on the weights they began with."""
    at_end: list[Callable[[BaseException | None], None]] = field(default_factory=list, repr=False)
    """Called with what ended the block, None when all is well."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        self.answer.close()
        for note in self.at_end:
            note(error)

    async def more(self) -> bytes:
        """What came after `first` and has not been read, as soon as there is something; b"" at the
        end. Raises EngineUnavailable when the engine is lost on the way."""
        try:
            return await self.answer.more()
        except LOST as error:
            raise lost_on_the_way(error) from error

    async def pour(self, take: Callable[[bytes], bool]) -> bool:
        """Give `take` what comes after `first`, at once, until it returns False; whether there is
        more. Raises EngineUnavailable as `more` does."""
        try:
            return await self.answer.pour(take)
        except LOST as error:
            raise lost_on_the_way(error) from error

    async def end(self) -> None:
        """Wait for the end of an answer that has told all: its connection can be used again."""
        if self.answer.is_whole:
            return
        with suppress(LOST):
            async with asyncio.timeout(_LAST_BYTES_S):
                await self.answer.rest()


def lost_on_the_way(error: BaseException) -> EngineUnavailable:
    return EngineUnavailable(
        f"the engine was lost while answering ({type(error).__name__}); send the request again",
        retry_after_s=1,
    )


def check_kind(content_type: str, *, whole: bool) -> None:
    """Raises EngineFailed for an answer that no engine gives: something else answers there."""
    expected = "application/json" if whole else "text/event-stream"
    if content_type != expected:
        raise EngineFailed(
            f"the engine's answer is {content_type[:60]!r} and not {expected}; send it again"
        )


def failure(status: int, body: bytes) -> EngineRefused | EngineFailed | EngineUnavailable:
    """What a status other than 200 means; addresses of memory are taken out of the text."""
    message = _MEMORY_ADDRESS.sub("", _message_of(body))[:_MAX_ERROR_CHARS]
    if 400 <= status < 500:
        refused = EngineRefused(f"the engine refused the request: {message}")
        refused.status = status
        return refused
    logger.warning("the engine answered %d: %s", status, message)
    if status == 503:
        return EngineUnavailable(
            "the engine takes no requests now; send it again later", retry_after_s=1
        )
    return EngineFailed("the engine failed on this request; send it again, or a simpler one")


def _message_of(body: bytes) -> str:
    try:
        content: Any = orjson.loads(body)
        return str(content["error"]["message"])
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return body[:_MAX_ERROR_CHARS].decode(errors="replace")
