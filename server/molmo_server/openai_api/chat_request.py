"""OpenAI's chat request, as far as Molmo2 serves it, with names checked strictly.

Knows: fields, parts, roles, and what is passed on to the engine as it is. Does not know: media
checks, token counts. Texts of one message are joined without anything between them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from molmo_core.api_requests import MediaOptions, Seed, StrictRequest
from molmo_core.errors import InvalidRequest
from molmo_core.prompts import Turn, with_style
from molmo_server.answers.grammar import AnswerForm, AnswerShape

_PASSED_ON = (
    *("temperature", "top_p", "top_k", "min_p", "n", "stop", "seed", "logprobs", "top_logprobs"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty", "ignore_eos", "min_tokens"),
)


class TextPart(StrictRequest):
    type: Literal["text"]
    text: str
    style: Annotated[str, Field(max_length=60, pattern=r"^\w+$")] | None = None
    """A style of Molmo2's training; written before the text as it was there."""


class ImageUrl(StrictRequest):
    url: str
    detail: Literal["auto", "low", "high"] | None = None
    """Taken for OpenAI's sake; the tiling is the model's."""


class ImagePart(StrictRequest):
    type: Literal["image_url"]
    image_url: ImageUrl


class VideoUrl(StrictRequest):
    url: str


class VideoPart(StrictRequest):
    type: Literal["video_url"]
    video_url: VideoUrl


def _as_parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


Part = Annotated[TextPart | ImagePart | VideoPart, Field(discriminator="type")]
_Text = str | list[TextPart]
_TextOrMedia = str | list[Part]
TextContent = Annotated[list[TextPart], BeforeValidator(_as_parts, json_schema_input_type=_Text)]
Content = Annotated[list[Part], BeforeValidator(_as_parts, json_schema_input_type=_TextOrMedia)]


class SystemMessage(StrictRequest):
    role: Literal["system", "developer"]
    content: TextContent


class UserMessage(StrictRequest):
    role: Literal["user"]
    content: Content


class AssistantMessage(StrictRequest):
    """An answer given back; fields of an answer that are not text are left aside."""

    model_config = ConfigDict(extra="ignore")

    role: Literal["assistant"]
    content: TextContent
    grounding: Any = None
    refusal: Any = None
    annotations: Any = None
    audio: Any = None
    function_call: None = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None
    reasoning: Any = None


class GroundingOptions(StrictRequest):
    """Ours: how the answer points."""

    constrained: AnswerForm
    """It is decoded under the grammar of this verb's answers."""
    max_points: Annotated[int, Field(ge=1, le=10_000)] | None = None


class StreamOptions(StrictRequest):
    include_usage: bool = False
    continuous_usage_stats: bool = False


Number = Annotated[float, Field(allow_inf_nan=False)]
_MOST = 1_000_000
"""Larger counts make no difference to an answer and do not fit into the engine's integers."""


class ChatRequest(StrictRequest):
    messages: Annotated[
        list[
            Annotated[SystemMessage | UserMessage | AssistantMessage, Field(discriminator="role")]
        ],
        Field(min_length=1),
    ]
    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=_MOST)] | None = None
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=_MOST)] | None = None
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    stop: str | list[str] | None = None
    seed: Seed | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0)] | None = None
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[Number, Field(ge=0.01, le=10)] | None = None
    """Logits are divided by it: by less, they are infinite and the engine has no answer."""
    ignore_eos: bool | None = None
    grounding: GroundingOptions | None = None
    media_options: MediaOptions | None = None
    user: str | None = None
    """Taken for OpenAI's sake, not used."""

    @model_validator(mode="after")
    def _system_comes_first(self) -> ChatRequest:
        roles = ["system" if isinstance(m, SystemMessage) else m.role for m in self.messages]
        n_system = roles.count("system")
        if "system" in roles[n_system:]:
            raise ValueError("a system message stands after another one; put it first")
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
        texts = [_text(m.content) for m in self.messages if isinstance(m, SystemMessage)]
        return "\n".join(texts)

    def turns(self) -> list[Turn]:
        return [
            Turn(role=m.role, text=_text(m.content))
            for m in self.messages
            if not isinstance(m, SystemMessage)
        ]

    def media_urls(self) -> tuple[list[str], list[str]]:
        """(images, videos) of all messages, in order."""
        parts = [p for m in self.messages if isinstance(m, UserMessage) for p in m.content]
        return (
            [p.image_url.url for p in parts if isinstance(p, ImagePart)],
            [p.video_url.url for p in parts if isinstance(p, VideoPart)],
        )

    @property
    def hides_usage(self) -> bool:
        """OpenAI's streams tell it only when asked."""
        return not (self.stream_options and self.stream_options.include_usage)

    def engine_options(self) -> dict[str, Any]:
        """Sampling fields that were set; sizes and messages are the gateway's.

        The engine is to tell a stream's usage also where the caller does not ask.
        """
        options = self.model_dump(include={*_PASSED_ON, "stream_options"}, exclude_none=True)
        if not self.stream:
            options.pop("stream_options", None)
        elif self.hides_usage:
            options["stream_options"] = {"include_usage": True}
        return options | ({"stream": True} if self.stream else {})


def check_limits(
    request: ChatRequest,
    *,
    max_choices: int,
    max_logprobs: int,
    max_stops: int,
    takes_min_p: bool,
) -> None:
    """Raises InvalidRequest for values above what this service allows."""
    n_stops = len(request.stop) if isinstance(request.stop, list) else 0
    for name, got, allowed in (
        ("n", request.n or 1, max_choices),
        ("top_logprobs", request.top_logprobs or 0, max_logprobs),
        ("stop", n_stops, max_stops),
    ):
        if got > allowed:
            unit = " texts" if name == "stop" else ""
            raise InvalidRequest(
                f"got {got}{unit} in {name}, allowed are {allowed}; ask for fewer", param=name
            )
    if request.min_p and not takes_min_p:
        raise InvalidRequest(
            f"min_p is {request.min_p}, and the engine drafts answers ahead, which it cannot under "
            "min_p: leave it out or use top_p, or start the server with MOLMO_DRAFTS=off",
            param="min_p",
        )


def _text(parts: list[Any]) -> str:
    return "".join(with_style(p.text, p.style) for p in parts if isinstance(p, TextPart))
