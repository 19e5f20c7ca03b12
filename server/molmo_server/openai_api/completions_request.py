"""OpenAI's completions request: texts that the model goes on from, and their log-probabilities.

Knows: fields, and what is passed on to the engine as it is. Does not know: token counts.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from molmo_server.openai_api.fields import (
    MOST,
    SAMPLING,
    Generated,
    NLogprobs,
    check_min_p,
    check_most,
    n_stops,
    not_served,
)
from molmo_server.questions.texts import Text

_PASSED_ON = {*SAMPLING, "logprobs", "prompt_logprobs", "return_token_ids", "echo"}
_DEFAULT_TOKENS = 16
"""OpenAI's, for this endpoint."""
_EXPECTED = "send a text, or a list of texts, none empty; token ids may stand for all"


def _as_texts(prompt: Any) -> list[Any]:
    """One or several texts, each written or as ids, none empty."""
    is_ids = isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], int)
    texts = [prompt] if is_ids or isinstance(prompt, str) else prompt
    if not isinstance(texts, list) or not texts:
        raise ValueError(_EXPECTED)
    n_ids = sum(len(text) for text in texts if isinstance(text, list))
    if n_ids > MOST:  # before each is looked at
        raise ValueError(f"got {n_ids:,} token ids; send fewer")
    if not all(map(_is_text, texts)) or len({isinstance(text, str) for text in texts}) > 1:
        raise ValueError(_EXPECTED)
    return texts


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_text(value: Any) -> bool:
    return bool(value) and (
        isinstance(value, str) or (isinstance(value, list) and all(map(_is_id, value)))
    )


_Sent = str | list[str] | list[int] | list[list[int]]


class CompletionsRequest(Generated):
    prompt: Annotated[list[Text], BeforeValidator(_as_texts, json_schema_input_type=_Sent)]
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    """0 goes with `echo`: the prompt alone, with its log-probabilities."""
    logprobs: NLogprobs | None = None
    echo: bool | None = None
    """The prompt is part of the answer; with `logprobs` its log-probabilities are as well."""
    prompt_logprobs: NLogprobs | None = None
    suffix: Annotated[Any, not_served("Molmo2 fills no gaps; leave it out", "")] = None
    best_of: Annotated[Any, not_served("answers are not ranked; use n", 1)] = None
    logit_bias: Annotated[Any, not_served("tokens have no bias; leave it out", {})] = None

    @model_validator(mode="after")
    def _fits_together(self) -> CompletionsRequest:
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens is 0, which goes with echo; ask for at least 1")
        if self.stream and self.prompt_logprobs is not None:
            raise ValueError("prompt_logprobs come with whole answers; leave out stream")
        return self

    @property
    def asked_tokens(self) -> int:
        return _DEFAULT_TOKENS if self.max_tokens is None else self.max_tokens

    @property
    def tells_values(self) -> bool:
        """Whether log-probabilities of the prompt are asked for."""
        is_echoed = bool(self.echo) and self.logprobs is not None
        return is_echoed or self.prompt_logprobs is not None

    def engine_options(self) -> dict[str, Any]:
        """See `ChatRequest.engine_options`."""
        options = self.model_dump(include=_PASSED_ON, exclude_none=True)
        return options | self.streaming()


def check_limits(
    request: CompletionsRequest,
    *,
    max_prompts: int,
    max_choices: int,
    max_logprobs: int,
    max_stops: int,
    takes_min_p: bool,
) -> None:
    """Raises InvalidRequest for values above what this service allows."""
    check_most(len(request.prompt), max_prompts, "prompt", " texts")
    check_most(request.n, max_choices, "n")
    check_most(request.logprobs, max_logprobs, "logprobs")
    check_most(request.prompt_logprobs, max_logprobs, "prompt_logprobs")
    check_most(n_stops(request.stop), max_stops, "stop", " texts")
    check_min_p(request.min_p, takes_min_p)
