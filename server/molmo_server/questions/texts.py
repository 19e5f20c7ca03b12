"""Texts that the model goes on from as they are: no chat around them, no media.

Before each stands BOS, as before every prompt in training; the engine puts it there.

Knows: what such texts may hold, their lengths. Does not know: HTTP, chat (`chat`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from molmo_core.errors import ControlTokenInText, InvalidRequest, PromptTooLong
from molmo_server.checkpoints.folder import Checkpoint
from molmo_server.checkpoints.live import LiveCheckpoint
from molmo_server.engine_pool import RemoteEngine
from molmo_server.prompt import check_text, check_values, too_long
from molmo_server.settings import MolmoSettings
from molmo_server.telemetry import Journey
from molmo_server.tenancy.callers import Caller
from molmo_server.tenancy.salts import TenantSalts

_PARAM = "prompt"
Text = str | list[int]
"""As written, or as the ids of its tokens."""


@dataclass(frozen=True, kw_only=True)
class TextQuestion:
    texts: Sequence[Text]
    model: str | None = None
    max_tokens: int
    """0: only the texts' own log-probabilities are wanted."""
    options: dict[str, Any]
    """Passed on to the engine as they are."""
    tells_values: bool = False
    """The log-probabilities of the texts are told."""
    caller: Caller = field(default_factory=Caller)


@dataclass(kw_only=True)
class AskedTexts:
    """Texts as each engine is asked them."""

    question: TextQuestion
    journey: Journey
    settings: MolmoSettings
    live: LiveCheckpoint
    salts: TenantSalts
    n_tokens: int = 0
    """Of all texts, as the engine that was asked last sees them."""
    answering: str = ""
    """Whose weights answer."""

    async def body_for(self, engine: RemoteEngine) -> bytes:
        """What an engine is sent; lengths are those of the checkpoint that it has.

        Raises ControlTokenInText, InvalidRequest, PromptTooLong; RateLimited by the caller's key.
        """
        question, checkpoint = self.question, self.live.of(engine.checkpoint_id)
        self.journey.begin("prompt")
        n_each = await asyncio.to_thread(_count_all, question.texts, checkpoint)
        longest, self.n_tokens = max(n_each), sum(n_each)
        if longest >= checkpoint.max_model_len:
            raise too_long(f"{longest:,}", checkpoint, param=_PARAM)
        if question.tells_values:
            check_values(longest, limit=self.settings.max_prompt_values)
        budget = _budget(question.max_tokens, longest, checkpoint, self.settings)
        await question.caller.pay(0)
        self.journey.begin("engine", engine=engine.name, checkpoint=checkpoint.id)
        texts: Any = question.texts
        salt = self.salts.of(question.caller.tenant)
        return orjson.dumps(
            {
                "model": self.settings.served_name,
                "prompt": texts[0] if len(texts) == 1 else texts,
                "max_tokens": budget,
                **question.options,
                **({"cache_salt": salt} if salt else {}),
            }
        )

    def note_tokens(self, *, prompt: int | None, completion: int) -> None:
        """What was used; `prompt` as the engine told, None: it did not."""
        n_prompt = self.n_tokens if prompt is None else prompt
        self.question.caller.note_tokens(prompt=n_prompt, visual=0, completion=completion)
        self.journey.tokens(self.answering, prompt=n_prompt, visual=0, completion=completion)


def check_texts(texts: Sequence[Text]) -> None:
    """Raises ControlTokenInText for what a text must not spell out."""
    for text in texts:
        if isinstance(text, str):
            check_text(text)


def _budget(asked: int, longest: int, checkpoint: Checkpoint, settings: MolmoSettings) -> int:
    """Tokens each answer may have; raises InvalidRequest, PromptTooLong."""
    limit, room = settings.max_tokens_limit, checkpoint.max_model_len - longest
    if asked > limit:
        raise InvalidRequest(
            f"got max_tokens {asked:,}, allowed are {limit:,}; ask for fewer", param="max_tokens"
        )
    if asked > room:
        raise PromptTooLong(
            f"the prompt has {longest:,} tokens and max_tokens is {asked:,}; together "
            f"{checkpoint.max_model_len:,} are allowed: ask for at most {room:,}",
            param="max_tokens",
        )
    return asked


def _count_all(texts: Sequence[Text], checkpoint: Checkpoint) -> list[int]:
    return [_count(text, checkpoint) for text in texts]


def _count(text: Text, checkpoint: Checkpoint) -> int:
    """Tokens with BOS, which ids may begin with; a text that is too long is not tokenized."""
    if isinstance(text, str):
        at_least = -(-len(text) // checkpoint.longest_token_chars)
        if at_least >= checkpoint.max_model_len:
            raise too_long(f"at least {at_least:,}", checkpoint, param=_PARAM)
        return 1 + checkpoint.count_tokens(text)
    if len(text) >= checkpoint.max_model_len:
        raise too_long(f"at least {len(text):,}", checkpoint, param=_PARAM)
    has_bos = text[0] == checkpoint.bos_id
    for token_id in text[has_bos:]:
        _check_id(token_id, checkpoint)
    return len(text) + (not has_bos)


def _check_id(token_id: int, checkpoint: Checkpoint) -> None:
    token = checkpoint.tokenizer.id_to_token(token_id) if token_id < 2**31 else None
    if token is None:
        raise InvalidRequest(
            f"got the token id {token_id}, which the tokenizer lacks; send ids of this model's "
            "tokenizer, or the text",
            param=_PARAM,
        )
    if token_id in checkpoint.control_ids:
        raise ControlTokenInText(
            f"got the id {token_id} of the model's own control token {token!r}; it cannot be part "
            "of a prompt: remove it"
        )
