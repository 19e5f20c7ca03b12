"""What every route needs, and the way from a question to the engine's answer.

Knows: the order of the steps. Does not know: routes, wire formats of answers.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from molmo_core import api
from molmo_core.errors import (
    EngineFailed,
    EngineRefused,
    EngineUnavailable,
    ModelNotFound,
    MolmoError,
)
from molmo_server.admission import Admission
from molmo_server.answers.usage import tell_visual_tokens
from molmo_server.answers.whole import chat_completion, text_completion, texts_of
from molmo_server.checkpoints.folder import Checkpoint
from molmo_server.checkpoints.live import LiveCheckpoint
from molmo_server.engine_pool import EnginePool, EngineReply, Trial
from molmo_server.engine_pool.exchange import COMPLETIONS_PATH
from molmo_server.media.gate import CheckedMedia, MediaGate
from molmo_server.media.options import check_options
from molmo_server.prompt import Prompt, check_turns
from molmo_server.questions.chat import Asked, Question
from molmo_server.questions.texts import AskedTexts, TextQuestion, check_texts
from molmo_server.settings import MolmoSettings
from molmo_server.telemetry import Journey, Metrics
from molmo_server.tenancy.callers import Caller
from molmo_server.tenancy.salts import TenantSalts

logger = logging.getLogger(__name__)


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
    salts: TenantSalts = field(default_factory=TenantSalts)
    shadows: set[asyncio.Task[None]] = field(default_factory=set)
    """Requests that nobody waits for."""
    others: tuple[Gateway, ...] = ()
    """Of other models, with the same media, admission and metrics."""
    without_grammars: set[str] = field(default_factory=set)
    """Names of engines of others that refuse to decode under one."""

    @property
    def checkpoint(self) -> Checkpoint:
        """What is served now; an answer's own is in its `EngineReply`."""
        return self.live.current

    def serving(self, name: str | None) -> Gateway:
        """That of the model of this name, which may be a checkpoint's id. Raises ModelNotFound."""
        every = (self, *self.others)
        for gateway in every:
            if name is None or name in gateway.names:
                return gateway
        known = "; ".join(" alias ".join(gateway.names) for gateway in every)
        raise ModelNotFound(
            f"there is no model {str(name)[:100]!r}; served is {known}", param="model"
        )

    @property
    def names(self) -> list[str]:
        """What its model can be asked for by; two checkpoints while engines are changed."""
        loaded = {engine.checkpoint_id for engine in self.engines.engines} - {self.checkpoint.id}
        known = [self.settings.served_name, self.checkpoint.id, *sorted(loaded)]
        if (trial := self.engines.trial) is not None and trial.is_open:
            known.append(trial.engine.checkpoint_id)
        return known

    def open(
        self, question: Question, *, request_id: str, whole: bool
    ) -> AbstractAsyncContextManager[tuple[Asked, EngineReply]]:
        """Admit, check and ask; the engine's first bytes have arrived when the block begins."""
        return self.serving(question.model)._open(question, request_id, whole)

    @asynccontextmanager
    async def _open(
        self, question: Question, request_id: str, whole: bool
    ) -> AsyncIterator[tuple[Asked, EngineReply]]:
        turns = check_turns(
            question.turns, system=question.system, is_continued=question.is_continued
        )
        async with self._admitted(question.caller) as (journey, deadline):
            media = await self._checked_media(question, journey)
            asked = Asked(
                question=question,
                turns=turns,
                media=media,
                journey=journey,
                settings=self.settings,
                live=self.live,
                without_grammars=self.without_grammars,
                salts=self.salts,
            )
            journey.begin("routing")
            ask = partial(
                self.engines.open,
                asked.body_for,
                request_id=request_id,
                deadline=deadline,
                whole=whole,
                medium=media.first_sha256,
                checkpoint_id=self._named(question.model),
            )
            try:
                with await _reply_to(asked, ask) as reply:
                    self._begin_answer(asked, reply, whole=whole)
                    yield asked, reply
            finally:
                asked.files.clear()

    def open_texts(
        self, question: TextQuestion, *, request_id: str, whole: bool
    ) -> AbstractAsyncContextManager[tuple[AskedTexts, EngineReply]]:
        """As `open`, for texts without a chat around them."""
        return self.serving(question.model)._open_texts(question, request_id, whole)

    async def complete_texts(
        self, question: TextQuestion, *, request_id: str
    ) -> tuple[dict[str, Any], str]:
        """The engine's whole completion, and whose weights answered."""
        async with self.open_texts(question, request_id=request_id, whole=True) as (asked, reply):
            answer = text_completion(reply)
            _note_usage(asked, answer)
            return answer, asked.answering

    @asynccontextmanager
    async def _open_texts(
        self, question: TextQuestion, request_id: str, whole: bool
    ) -> AsyncIterator[tuple[AskedTexts, EngineReply]]:
        check_texts(question.texts)
        async with self._admitted(question.caller) as (journey, deadline):
            asked = AskedTexts(
                question=question,
                journey=journey,
                settings=self.settings,
                live=self.live,
                salts=self.salts,
            )
            journey.begin("routing")
            asking = self.engines.open(
                asked.body_for,
                path=COMPLETIONS_PATH,
                request_id=request_id,
                deadline=deadline,
                whole=whole,
                checkpoint_id=self._named(question.model),
            )
            with await asking as reply:
                self._begin_answer(asked, reply, whole=whole)
                yield asked, reply

    @asynccontextmanager
    async def _admitted(self, caller: Caller) -> AsyncIterator[tuple[Journey, float]]:
        """The caller's turn, with its deadline; what is done in it is measured."""
        self.engines.check_hope()
        with Journey(self.metrics) as journey:
            journey.begin("queue")
            admitted = self.admission.admit(caller.tenant, is_background=caller.is_background)
            async with admitted as deadline:
                yield journey, deadline

    async def _checked_media(self, question: Question, journey: Journey) -> CheckedMedia:
        image_urls, video_urls = question.image_urls, question.video_urls
        journey.begin("media", n_images=len(image_urls), n_videos=len(video_urls))
        media = question.media or await self.media.check(
            image_urls, video_urls, owner=question.caller.tenant
        )
        if question.media_options is not None:
            check_options(question.media_options, media)
        if question.region is None or question.media is not None:
            return media
        [image] = media.images
        return CheckedMedia(images=(await self.media.part(image, question.region),))

    async def complete(self, question: Question, *, request_id: str) -> Completion:
        """The engine's whole chat completion."""
        serving = self.serving(question.model)
        async with serving._open(question, request_id, whole=True) as (asked, reply):
            answer = chat_completion(reply)
            usage = _note_usage(asked, answer)
            tell_visual_tokens(usage, asked.prompt.visual_usage())
            answered = Completion(prompt=asked.prompt, answer=answer, checkpoint_id=asked.answering)
        serving._compare(asked, answered, request_id)
        return answered

    def _compare(self, asked: Asked, answered: Completion, request_id: str) -> None:
        """Perhaps have an engine on trial answer as well, behind the scenes, one at a time."""
        trial = self.engines.trial
        is_greedy = asked.question.options.get("temperature") == 0
        if trial is None or not is_greedy or self.shadows:
            return
        if answered.checkpoint_id == trial.engine.checkpoint_id or not trial.is_to_be_compared():
            return
        texts = texts_of(answered.answer)
        task = asyncio.create_task(self._ask_trial(trial, asked, texts, request_id))
        self.shadows.add(task)
        task.add_done_callback(self.shadows.discard)

    async def _ask_trial(
        self, trial: Trial, asked: Asked, texts: list[str], request_id: str
    ) -> None:
        try:
            async with (
                asyncio.timeout(self.settings.deadline_s),
                self.engines.shadow(trial, asked.body_for, request_id=request_id) as reply,
            ):
                is_same = texts_of(chat_completion(reply)) == texts
        except (EngineUnavailable, EngineFailed):
            return  # noted by the pool
        except TimeoutError:
            trial.figures.n_failed += 1
            return
        except MolmoError as error:  # refused: a shorter context, other limits
            logger.info("the engine on trial refuses %s: %s", request_id, error.message)
            is_same = False
        finally:
            asked.files.clear()
        trial.figures.n_compared += 1
        trial.figures.n_same += is_same

    def id_of(self, reply: EngineReply) -> str:
        """Whose weights answered; an engine of others may not say."""
        return reply.checkpoint_id or self.checkpoint.id

    def note(self, grounding: api.Grounding) -> None:
        """Count what was pointed at."""
        self.metrics.observations.labels("point").inc(len(grounding.points))
        n_tracked = sum(len(track.points) for track in grounding.tracks)
        self.metrics.observations.labels("track").inc(n_tracked)

    def _named(self, model: str | None) -> str | None:
        """The checkpoint that a caller names as model, if it is one."""
        return None if model == self.settings.served_name else model

    def _begin_answer(self, asked: Asked | AskedTexts, reply: EngineReply, *, whole: bool) -> None:
        """Whoever names a checkpoint gets no other, also when it changes while they wait."""
        name, answering = asked.question.model, self.id_of(reply)
        if name not in (None, self.settings.served_name, answering):
            raise ModelNotFound(
                f"{str(name)[:100]!r} is served no more, {answering} is: ask for that, or for "
                f"{self.settings.served_name}",
                param="model",
            )
        asked.answering = answering
        if not whole:
            asked.journey.first_token(answering)


async def _reply_to(asked: Asked, ask: Callable[[], Awaitable[EngineReply]]) -> EngineReply:
    """Asked once more without a grammar, where the engine may have refused that."""
    try:
        return await ask()
    except EngineRefused:
        if not asked.can_do_without_grammar():
            raise
    reply = await ask()
    asked.note_engine_without_grammars()
    return reply


def _note_usage(asked: Asked | AskedTexts, answer: dict[str, Any]) -> dict[str, Any]:
    """What a whole answer used, as the engine told."""
    usage: dict[str, Any] = answer["usage"] or {}
    n_tokens = usage.get("completion_tokens", 0)
    asked.note_tokens(prompt=usage.get("prompt_tokens"), completion=n_tokens)
    return usage
