"""What every route needs, and the way from a question to the engine's answer.

Knows: the order of the steps. Does not know: routes, wire formats of answers.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import orjson

from molmo_core import api
from molmo_core.errors import EngineFailed, NotFound
from molmo_core.prompts import Turn
from molmo_server.admission import Admission
from molmo_server.checkpoints.folder import Checkpoint
from molmo_server.checkpoints.rollout import LiveCheckpoint
from molmo_server.engine_pool import EnginePool, EngineReply
from molmo_server.media import MediaGate
from molmo_server.prompt import Prompt, answer_budget, check_turns, measure
from molmo_server.settings import MolmoSettings
from molmo_server.telemetry import Metrics


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is asked, before media are checked. URLs are data URLs."""

    turns: Sequence[Turn]
    system: str = ""
    image_urls: Sequence[str] = ()
    video_urls: Sequence[str] = ()
    model: str | None = None
    max_tokens: int | None = None
    options: dict[str, Any]
    """Passed on to the engine as they are."""


@dataclass(frozen=True, kw_only=True)
class Completion:
    prompt: Prompt
    answer: dict[str, Any]
    checkpoint_id: str


@dataclass(frozen=True, kw_only=True)
class Gateway:
    settings: MolmoSettings
    live: LiveCheckpoint
    engines: EnginePool
    media: MediaGate
    admission: Admission
    metrics: Metrics

    @property
    def checkpoint(self) -> Checkpoint:
        """What is served now; an answer's own is in its `EngineReply`."""
        return self.live.current

    @asynccontextmanager
    async def open(
        self, question: Question, *, request_id: str, whole: bool
    ) -> AsyncIterator[tuple[Prompt, EngineReply]]:
        """Admit, check and ask; the engine's first bytes have arrived when the block begins."""
        self._check_model(question.model)
        turns = check_turns(question.turns, system=question.system)
        self.engines.check_hope()
        async with self.admission.admit() as deadline:
            media = await self.media.check(question.image_urls, question.video_urls)
            prompt = await measure(turns, media, self.checkpoint)
            body = self._engine_body(question, prompt)
            async with self.engines.open(
                body, request_id=request_id, deadline=deadline, whole=whole
            ) as reply:
                self._check_answering(question.model, self.id_of(reply))
                yield prompt, reply

    async def complete(self, question: Question, *, request_id: str) -> Completion:
        """The engine's whole chat completion."""
        async with self.open(question, request_id=request_id, whole=True) as (prompt, reply):
            try:
                answer: dict[str, Any] = orjson.loads(reply.first)
            except orjson.JSONDecodeError as error:
                raise EngineFailed("the engine's answer was cut short; send it again") from error
            return Completion(prompt=prompt, answer=answer, checkpoint_id=self.id_of(reply))

    def id_of(self, reply: EngineReply) -> str:
        """Whose weights answered; an engine of others may not say."""
        return reply.checkpoint_id or self.checkpoint.id

    def note(self, grounding: api.Grounding) -> None:
        """Count what was pointed at."""
        self.metrics.observations.labels("point").inc(len(grounding.points))
        n_tracked = sum(len(track.points) for track in grounding.tracks)
        self.metrics.observations.labels("track").inc(n_tracked)

    def _engine_body(self, question: Question, prompt: Prompt) -> bytes:
        budget = answer_budget(
            prompt,
            self.checkpoint,
            asked=question.max_tokens,
            default=self.settings.default_max_tokens,
            limit=self.settings.max_tokens_limit,
        )
        return orjson.dumps(
            {
                "model": self.settings.served_name,
                "messages": prompt.messages(),
                "max_tokens": budget,
                **question.options,
            }
        )

    def _check_answering(self, name: str | None, answering: str) -> None:
        """Whoever names a checkpoint gets no other, also when it changes while they wait."""
        if name not in (None, self.settings.served_name, answering):
            raise NotFound(
                f"{str(name)[:100]!r} is served no more, {answering} is: ask for that, or for "
                f"{self.settings.served_name}",
                param="model",
            )

    def _check_model(self, name: str | None) -> None:
        known = (self.settings.served_name, self.checkpoint.id)
        if name is not None and name not in known:
            raise NotFound(
                f"there is no model {name[:100]!r}; served is {' alias '.join(known)}",
                param="model",
            )
