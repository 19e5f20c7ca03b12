"""What every route needs, and the way from a question to the engine's answer.

Knows: the order of the steps. Does not know: routes, wire formats of answers.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import orjson

from molmo_core import api
from molmo_core.errors import EngineFailed, EngineUnavailable, ModelNotFound, MolmoError
from molmo_core.prompts import Turn
from molmo_server.admission import Admission
from molmo_server.answers.grammar import AnswerForm, answer_grammar
from molmo_server.answers.usage import tell_visual_tokens
from molmo_server.checkpoints.folder import Checkpoint
from molmo_server.checkpoints.live import LiveCheckpoint
from molmo_server.engine_pool import EnginePool, EngineReply, RemoteEngine, Trial
from molmo_server.engine_pool.exchange import COMPLETIONS_PATH
from molmo_server.media.gate import CheckedMedia, MediaGate
from molmo_server.prompt import Prompt, answer_budget, check_turns, check_values, measure
from molmo_server.settings import MolmoSettings
from molmo_server.telemetry import Metrics
from molmo_server.tenancy.callers import Caller
from molmo_server.text_question import AskedTexts, TextQuestion, check_texts

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is asked, before media are checked."""

    turns: Sequence[Turn]
    system: str = ""
    image_urls: Sequence[str] = ()
    video_urls: Sequence[str] = ()
    model: str | None = None
    max_tokens: int | None = None
    options: dict[str, Any]
    """Passed on to the engine as they are."""
    form: AnswerForm | None = None
    """The answer is decoded under the grammar of this form."""
    is_continued: bool = False
    """The last turn is the assistant's: the answer goes on from it."""
    caller: Caller = field(default_factory=Caller)


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
    shadows: set[asyncio.Task[None]] = field(default_factory=set)
    """Requests that nobody waits for."""

    @property
    def checkpoint(self) -> Checkpoint:
        """What is served now; an answer's own is in its `EngineReply`."""
        return self.live.current

    @asynccontextmanager
    async def open(
        self, question: Question, *, request_id: str, whole: bool
    ) -> AsyncIterator[tuple[Asked, EngineReply]]:
        """Admit, check and ask; the engine's first bytes have arrived when the block begins."""
        self._check_model(question.model)
        turns = check_turns(
            question.turns, system=question.system, is_continued=question.is_continued
        )
        self.engines.check_hope()
        async with self.admission.admit(question.caller.tenant) as deadline:
            media = await self.media.check(question.image_urls, question.video_urls)
            asked = Asked(gateway=self, question=question, turns=turns, media=media)
            async with self.engines.open(
                asked.body_for,
                request_id=request_id,
                deadline=deadline,
                whole=whole,
                checkpoint_id=self._named(question.model),
            ) as reply:
                self._check_answering(question.model, self.id_of(reply))
                yield asked, reply

    @asynccontextmanager
    async def open_texts(
        self, question: TextQuestion, *, request_id: str, whole: bool
    ) -> AsyncIterator[tuple[AskedTexts, EngineReply]]:
        """As `open`, for texts without a chat around them."""
        self._check_model(question.model)
        check_texts(question.texts)
        self.engines.check_hope()
        async with self.admission.admit(question.caller.tenant) as deadline:
            asked = AskedTexts(question=question, settings=self.settings, live=self.live)
            async with self.engines.open(
                asked.body_for,
                path=COMPLETIONS_PATH,
                request_id=request_id,
                deadline=deadline,
                whole=whole,
                checkpoint_id=self._named(question.model),
            ) as reply:
                self._check_answering(question.model, self.id_of(reply))
                yield asked, reply

    async def complete(self, question: Question, *, request_id: str) -> Completion:
        """The engine's whole chat completion."""
        async with self.open(question, request_id=request_id, whole=True) as (asked, reply):
            answer = whole_answer(reply)
            usage = answer.get("usage") or {}
            asked.note_tokens(completion=usage.get("completion_tokens", 0))
            tell_visual_tokens(usage, asked.prompt.visual_usage())
            answered = Completion(
                prompt=asked.prompt, answer=answer, checkpoint_id=self.id_of(reply)
            )
        self._compare(asked, answered, request_id)
        return answered

    def _compare(self, asked: Asked, answered: Completion, request_id: str) -> None:
        """Perhaps have an engine on trial answer as well, behind the scenes, one at a time."""
        trial = self.engines.trial
        is_greedy = asked.question.options.get("temperature") == 0
        if trial is None or not is_greedy or self.shadows:
            return
        if answered.checkpoint_id == trial.engine.checkpoint_id or not trial.is_to_be_compared():
            return
        texts = _texts(answered.answer)
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
                is_same = _texts(whole_answer(reply)) == texts
        except (EngineUnavailable, EngineFailed):
            return  # noted by the pool
        except TimeoutError:
            trial.figures.n_failed += 1
            return
        except MolmoError as error:  # refused: a shorter context, other limits
            logger.info("the engine on trial refuses %s: %s", request_id, error.message)
            is_same = False
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

    def _check_answering(self, name: str | None, answering: str) -> None:
        """Whoever names a checkpoint gets no other, also when it changes while they wait."""
        if name not in (None, self.settings.served_name, answering):
            raise ModelNotFound(
                f"{str(name)[:100]!r} is served no more, {answering} is: ask for that, or for "
                f"{self.settings.served_name}",
                param="model",
            )

    def _check_model(self, name: str | None) -> None:
        known = [self.settings.served_name, self.checkpoint.id]
        if (trial := self.engines.trial) is not None and trial.is_open:
            known.append(trial.engine.checkpoint_id)
        if name is not None and name not in known:
            raise ModelNotFound(
                f"there is no model {name[:100]!r}; served is {' alias '.join(known)}",
                param="model",
            )


@dataclass(kw_only=True)
class Asked:
    """A question with its media, as each engine is asked it."""

    gateway: Gateway
    question: Question
    turns: tuple[Turn, ...]
    media: CheckedMedia
    prompt: Prompt = field(init=False)
    """As the engine that was asked last sees it."""

    async def body_for(self, engine: RemoteEngine) -> bytes:
        """What an engine is sent: media and budget are measured for the checkpoint that it has.

        Raises PromptTooLong, InvalidRequest; TooManyMedia and RateLimited by the caller's key.
        """
        checkpoint = self.gateway.live.of(engine.checkpoint_id)
        settings = self.gateway.settings
        self.prompt = await measure(self.turns, self.media, checkpoint)
        if "prompt_logprobs" in self.question.options:
            check_values(self.prompt.n_tokens, limit=settings.max_prompt_values)
        budget = answer_budget(
            self.prompt.n_tokens,
            checkpoint,
            asked=self.question.max_tokens,
            default=settings.default_max_tokens,
            limit=settings.max_tokens_limit,
        )
        options = self.question.options
        if self.question.form is not None:
            grammar = answer_grammar(self.question.form, self.prompt, budget)
            options = {**options, "structured_outputs": {"grammar": grammar}}
        self.question.caller.pay(self.prompt.n_visual_tokens)
        return orjson.dumps(
            {
                "model": settings.served_name,
                "messages": self.prompt.messages(),
                "max_tokens": budget,
                **options,
            }
        )

    def note_tokens(self, *, completion: int) -> None:
        """What the caller used, of an answer of so many tokens."""
        self.question.caller.note_tokens(
            prompt=self.prompt.n_tokens,
            visual=self.prompt.n_visual_tokens,
            completion=completion,
        )


def whole_answer(reply: EngineReply) -> dict[str, Any]:
    try:
        answer: dict[str, Any] = orjson.loads(reply.first)
    except orjson.JSONDecodeError as error:
        raise EngineFailed("the engine's answer was cut short; send it again") from error
    return answer


def _texts(answer: dict[str, Any]) -> list[str]:
    return [choice["message"]["content"] for choice in answer["choices"]]
