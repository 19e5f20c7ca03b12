"""A question in a chat, and what an engine is sent for it.

Knows: media and budget as a checkpoint measures them, grammars. Does not know: the order of the
steps (`gateway`), HTTP.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import orjson

from molmo_core import api
from molmo_core.errors import InvalidRequest
from molmo_core.prompts import Turn
from molmo_server.answers.grammar import AnswerShape, answer_grammar
from molmo_server.checkpoints.live import LiveCheckpoint
from molmo_server.engine_pool import RemoteEngine
from molmo_server.media.gate import CheckedMedia
from molmo_server.media.handing import HandedFiles
from molmo_server.media.options import engine_fields
from molmo_server.prompt import Prompt, answer_budget, check_values, measure
from molmo_server.settings import MolmoSettings
from molmo_server.telemetry import Journey
from molmo_server.tenancy.callers import Caller
from molmo_server.tenancy.salts import TenantSalts

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
    media: CheckedMedia | None = None
    """Those that were checked already, instead of the URLs."""
    region: api.Region | None = None
    """Of the one image, all that is looked at."""
    shape: AnswerShape | None = None
    """Of an answer that points."""
    constrained: bool | None = None
    """Whether it is decoded under the shape's grammar; None: as the settings say, if the engine
    can."""
    is_continued: bool = False
    """The last turn is the assistant's: the answer goes on from it."""
    media_options: api.MediaOptions | None = None
    caller: Caller = field(default_factory=Caller)


@dataclass(kw_only=True)
class Asked:
    """A question with its media, as each engine is asked it."""

    question: Question
    turns: tuple[Turn, ...]
    media: CheckedMedia
    journey: Journey
    settings: MolmoSettings
    live: LiveCheckpoint
    without_grammars: set[str]
    """Names of engines of others that refuse to decode under one; added to."""
    salts: TenantSalts
    files: HandedFiles = field(default_factory=HandedFiles)
    prompt: Prompt = field(init=False)
    """As the engine that was asked last sees it."""
    answering: str = ""
    """Whose weights answer."""
    _engine_name: str = ""
    _is_of_others: bool = False
    _has_grammar: bool = False
    _may_have_grammar: bool = True

    async def body_for(self, engine: RemoteEngine) -> bytes:
        """What an engine is sent: media and budget are measured for the checkpoint that it has.

        Raises PromptTooLong, InvalidRequest; TooManyMedia and RateLimited by the caller's key.
        """
        checkpoint, settings = self.live.of(engine.checkpoint_id), self.settings
        self.journey.begin("prompt")
        looked_at = self.question.media_options
        if looked_at is not None and not engine.takes_media_options:
            raise InvalidRequest(
                "got media_options, which this server's engine does not know: it is not one of "
                "ours; leave them out",
                param="media_options",
            )
        self.prompt = await measure(self.turns, self.media, checkpoint, looked_at)
        if "prompt_logprobs" in self.question.options:
            check_values(self.prompt.n_tokens, limit=settings.max_prompt_values)
        budget = answer_budget(
            self.prompt,
            asked=self.question.max_tokens,
            default=settings.default_max_tokens,
            limit=settings.max_tokens_limit,
        )
        options = self.question.options
        shape = self.question.shape
        self._engine_name, self._is_of_others = engine.name, bool(engine.url)
        self._has_grammar = shape is not None and self._is_constrained(engine)
        if shape is not None and self._has_grammar:
            grammar = answer_grammar(shape, self.prompt, budget)
            options = {**options, "structured_outputs": {"grammar": grammar}}
        elif shape is not None and self.prompt.media.video is not None:
            shape.moments_s(self.prompt.media.video)  # refuses what no answer could be about
        await self.question.caller.pay(self.prompt.n_visual_tokens)
        url_of = partial(self.files.url, folder=engine.media_folder)
        messages = await self.prompt.messages(url_of)
        self.journey.begin("engine", engine=engine.name, checkpoint=checkpoint.id)
        return orjson.dumps(
            {
                "model": settings.served_name,
                "messages": messages,
                "max_tokens": budget,
                **options,
                **self._kept_apart(engine),
            }
        )

    def _kept_apart(self, engine: RemoteEngine) -> dict[str, Any]:
        """What media are looked at with, and what keeps this tenant's caches from others'."""
        salt = self.salts.of(self.question.caller.tenant)
        fields = {"cache_salt": salt} if salt else {}
        if not engine.takes_media_options or self.media == CheckedMedia():
            return fields
        options = self.question.media_options or api.MediaOptions()
        return fields | engine_fields(options, tenant_salt=salt)

    def _is_constrained(self, engine: RemoteEngine) -> bool:
        wish = self.question.constrained
        if wish is not None:
            return wish
        is_able = engine.name not in self.without_grammars
        return self.settings.constrains_verbs and is_able and self._may_have_grammar

    def can_do_without_grammar(self) -> bool:
        """After a refusal: whether it may have been for a grammar that nobody asked for."""
        if self.question.constrained is not None or not self._has_grammar:
            return False
        self._may_have_grammar = False
        return True

    def note_engine_without_grammars(self) -> None:
        """It answered without one what it had refused with one."""
        logger.warning("engine %s refused a grammar and answered without", self._engine_name)
        if self._is_of_others:
            self.without_grammars.add(self._engine_name)

    def note_tokens(self, *, prompt: int | None, completion: int) -> None:
        """What was used; `prompt` as the engine told, None: it did not."""
        n_prompt = self.prompt.n_tokens if prompt is None else prompt
        n_visual = self.prompt.n_visual_tokens
        self.question.caller.note_tokens(prompt=n_prompt, visual=n_visual, completion=completion)
        self.journey.tokens(self.answering, prompt=n_prompt, visual=n_visual, completion=completion)
