"""OpenAI's chat request, as far as Molmo2 serves it, with names checked strictly.

Knows: fields, and what is passed on to the engine as it is. Does not know: messages (`messages`),
media checks, token counts.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from molmo_core.api_requests import MediaOptions, StrictRequest
from molmo_core.errors import InvalidRequest
from molmo_core.prompts import Turn
from molmo_server.answers.grammar import AnswerForm, AnswerShape
from molmo_server.openai_api.fields import (
    NO_TOOLS,
    SAMPLING,
    Count,
    Generated,
    NLogprobs,
    NoTools,
    check_min_p,
    check_most,
    n_stops,
    not_served,
)
from molmo_server.openai_api.messages import (
    AssistantMessage,
    Message,
    check_order,
    media_urls_of,
    system_text,
    turns_of,
)
from molmo_server.openai_api.response_format import ChatFormat, held_to, held_to_json

_PASSED_ON = {*SAMPLING, "logprobs", "top_logprobs", "prompt_logprobs", "return_token_ids"}


class GroundingOptions(StrictRequest):
    """Ours: how the answer points."""

    constrained: AnswerForm
    """It is decoded under the grammar of this verb's answers."""
    max_points: Annotated[int, Field(ge=1, le=10_000)] | None = None


class ChatRequest(Generated, NoTools):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: NLogprobs | None = None
    prompt_logprobs: NLogprobs | None = None
    """So many most probable tokens at each place of the prompt, and the one that stands there."""
    grounding: GroundingOptions | None = None
    media_options: MediaOptions | None = None
    response_format: ChatFormat | None = None
    continue_final_message: bool = False
    """The last message is the beginning of the answer, or all of it where its loss is wanted."""
    add_generation_prompt: bool | None = None
    modalities: Annotated[Any, not_served("answers are text; send ['text']", ["text"])] = None
    functions: Annotated[Any, not_served(NO_TOOLS, [])] = None
    function_call: Annotated[Any, not_served(NO_TOOLS, "none", "auto")] = None
    logit_bias: Annotated[Any, not_served("tokens have no bias; leave it out", {})] = None
    prediction: Annotated[Any, not_served("no answer is foretold here; leave it out")] = None
    reasoning_effort: Annotated[Any, not_served("it does not reason; leave it out", "none")] = None
    verbosity: Annotated[Any, not_served("ask for it in the text; leave it out")] = None
    web_search_options: Annotated[Any, not_served("nothing is searched here; leave it out")] = None
    audio: Annotated[Any, not_served("Molmo2 does not speak; leave it out")] = None

    @model_validator(mode="after")
    def _fits_together(self) -> ChatRequest:
        check_order(self.messages)
        is_answer = isinstance(self.messages[-1], AssistantMessage)
        if self.continue_final_message and not is_answer:
            raise ValueError("continue_final_message needs the assistant's message last; add it")
        if self.add_generation_prompt is self.continue_final_message:
            raise ValueError(
                "add_generation_prompt and continue_final_message say opposite things of the same; "
                "send one of them"
            )
        if self.stream and self.prompt_logprobs is not None:
            raise ValueError("prompt_logprobs come with whole answers; leave out stream")
        if self.grounding is not None and held_to_json(self.response_format):
            raise ValueError("grounding.constrained and response_format are two grammars; send one")
        return self

    def shape(self) -> AnswerShape | None:
        """That of the answer; raises InvalidRequest for media that it cannot be about."""
        if self.grounding is None:
            return None
        images, videos = self.media_urls()
        form = self.grounding.constrained
        if not videos and (form == "track" or not images):
            needed = "a video" if form == "track" else "images or a video"
            raise InvalidRequest(
                f"got grounding.constrained {form!r} and {len(images)} images; send {needed}, or "
                "leave it out",
                param="grounding.constrained",
            )
        return AnswerShape(form=form, max_points=self.grounding.max_points)

    @property
    def asked_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    def system(self) -> str:
        return system_text(self.messages)

    def turns(self) -> list[Turn]:
        return turns_of(self.messages)

    def media_urls(self) -> tuple[list[str], list[str]]:
        """(images, videos) of all messages, in order."""
        return media_urls_of(self.messages)

    def engine_options(self, *, max_schema_bytes: int) -> dict[str, Any]:
        """Sampling fields that were set; sizes and messages are the gateway's.

        The engine is to tell a stream's usage also where the caller does not ask. Raises
        InvalidRequest for a schema that is not served.
        """
        options = self.model_dump(include=_PASSED_ON, exclude_none=True)
        if self.continue_final_message:
            options["add_generation_prompt"] = False
        options |= held_to(
            self.response_format, max_bytes=max_schema_bytes, param="response_format"
        )
        return options | self.streaming()


def check_limits(
    request: ChatRequest,
    *,
    max_choices: int,
    max_logprobs: int,
    max_stops: int,
    takes_min_p: bool,
) -> None:
    """Raises InvalidRequest for values above what this service allows."""
    check_most(request.n, max_choices, "n")
    check_most(request.top_logprobs, max_logprobs, "top_logprobs")
    check_most(request.prompt_logprobs, max_logprobs, "prompt_logprobs")
    check_most(n_stops(request.stop), max_stops, "stop", " texts")
    check_min_p(request.min_p, takes_min_p)
