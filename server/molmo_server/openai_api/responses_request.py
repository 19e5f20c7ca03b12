"""OpenAI's responses request, as far as Molmo2 serves it: one answer, nothing kept, no tools.

Knows: fields and items, and how they become the messages of a chat. Does not know: media checks,
token counts.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from molmo_core.api_requests import StrictRequest
from molmo_server.openai_api.fields import (
    Count,
    NLogprobs,
    NoTools,
    TakenFields,
    Temperature,
    TopP,
    check_most,
    not_served,
)
from molmo_server.openai_api.messages import (
    AssistantMessage,
    ImagePart,
    ImageUrl,
    SystemMessage,
    TextPart,
    UserMessage,
    VideoPart,
    VideoUrl,
    check_order,
)
from molmo_server.openai_api.response_format import ResponsesFormat, TextFormat, held_to

LOGPROBS = "message.output_text.logprobs"
_NOTHING_KEPT = "no answer is kept; send the whole conversation as input"


class InputText(StrictRequest):
    type: Literal["input_text"]
    text: str
    style: Annotated[str, Field(max_length=60, pattern=r"^\w+$")] | None = None
    """As in chat: a style of Molmo2's training."""


class InputImage(StrictRequest):
    type: Literal["input_image"]
    image_url: str
    detail: Literal["auto", "low", "high", "original"] | None = None
    """Taken for OpenAI's sake; the tiling is the model's."""
    file_id: Annotated[Any, not_served("send the picture, or its URL, in image_url")] = None


class InputVideo(StrictRequest):
    """Ours: OpenAI has no videos here."""

    type: Literal["input_video"]
    video_url: str


class OutputText(StrictRequest):
    """Of an answer given back; what is not text is left aside."""

    model_config = ConfigDict(extra="ignore")

    type: Literal["output_text"]
    text: str
    annotations: Any = None
    logprobs: Any = None
    grounding: Any = None


def _as_parts(content: Any) -> Any:
    return [{"type": "input_text", "text": content}] if isinstance(content, str) else content


def _as_items(sent: Any) -> Any:
    return [{"role": "user", "content": sent}] if isinstance(sent, str) else sent


Part = Annotated[
    InputText | InputImage | InputVideo | OutputText,
    Field(discriminator="type"),
]
Parts = Annotated[list[Part], BeforeValidator(_as_parts, json_schema_input_type=str | list[Part])]


class InputMessage(StrictRequest):
    """A message, also one of the answers given back."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Parts
    id: str | None = None
    status: str | None = None
    phase: str | None = None

    def as_message(self) -> SystemMessage | UserMessage | AssistantMessage:
        """Raises ValueError where a part does not belong to the role."""
        texts = [_as_text(p) for p in self.content if isinstance(p, (InputText, OutputText))]
        if self.role == "user":
            return UserMessage(role="user", content=[_as_part(p) for p in self.content])
        if len(texts) < len(self.content):
            raise ValueError(f"a message of the role {self.role} holds more than text; remove it")
        if self.role == "assistant":
            return AssistantMessage(role="assistant", content=texts)
        return SystemMessage(role=self.role, content=texts)


def _as_text(part: InputText | OutputText) -> TextPart:
    style = part.style if isinstance(part, InputText) else None
    return TextPart(type="text", text=part.text, style=style)


def _as_part(part: Any) -> TextPart | ImagePart | VideoPart:
    if isinstance(part, InputImage):
        return ImagePart(type="image_url", image_url=ImageUrl(url=part.image_url))
    if isinstance(part, InputVideo):
        return VideoPart(type="video_url", video_url=VideoUrl(url=part.video_url))
    return _as_text(part)


class TextOptions(StrictRequest):
    format: ResponsesFormat | None = None
    verbosity: Annotated[Any, not_served("ask for it in the text; leave it out")] = None


class ResponsesStreamOptions(StrictRequest):
    include_obfuscation: bool | None = None
    """Taken for OpenAI's sake; nothing is padded."""


_Sent = str | list[InputMessage]


class ResponsesRequest(TakenFields, NoTools):
    input: Annotated[
        list[InputMessage],
        BeforeValidator(_as_items, json_schema_input_type=_Sent),
        Field(min_length=1),
    ]
    instructions: str | None = None
    model: str | None = None
    stream: bool = False
    stream_options: ResponsesStreamOptions | None = None
    max_output_tokens: Count | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_logprobs: NLogprobs | None = None
    include: list[Literal["message.output_text.logprobs"]] | None = None
    text: TextOptions | None = None
    truncation: Annotated[Any, not_served("no prompt is cut; leave it out", "disabled")] = None
    background: Annotated[Any, not_served("answers are waited for; leave it out", False)] = None
    previous_response_id: Annotated[Any, not_served(_NOTHING_KEPT)] = None
    conversation: Annotated[Any, not_served(_NOTHING_KEPT)] = None
    prompt: Annotated[Any, not_served("no prompts are kept; send the text as input")] = None
    reasoning: Annotated[Any, not_served("it does not reason; leave it out", {})] = None
    max_tool_calls: Annotated[Any, not_served("Molmo2 calls no tools; leave it out")] = None

    @model_validator(mode="after")
    def _are_messages(self) -> ResponsesRequest:
        check_order(self.messages())
        return self

    def messages(self) -> list[SystemMessage | UserMessage | AssistantMessage]:
        told = [] if self.instructions is None else [_as_text_message(self.instructions)]
        return [*told, *(item.as_message() for item in self.input)]

    @property
    def tells_logprobs(self) -> bool:
        return LOGPROBS in (self.include or ())

    @property
    def form(self) -> Any:
        return (self.text and self.text.format) or TextFormat(type="text")

    def engine_options(self, *, max_schema_bytes: int) -> dict[str, Any]:
        """Of the engine's chat; usage is always told. Raises InvalidRequest for a bad schema."""
        options = self.model_dump(include={"temperature", "top_p"}, exclude_none=True)
        if self.tells_logprobs:
            options |= {"logprobs": True, "top_logprobs": self.top_logprobs or 0}
        if self.stream:
            options |= {"stream": True, "stream_options": {"include_usage": True}}
        return options | held_to(self.form, max_bytes=max_schema_bytes, param="text.format")


def _as_text_message(instructions: str) -> SystemMessage:
    part = TextPart(type="text", text=instructions)
    return SystemMessage(role="system", content=[part])


def check_limits(request: ResponsesRequest, *, max_logprobs: int) -> None:
    """Raises InvalidRequest for values above what this service allows."""
    check_most(request.top_logprobs, max_logprobs, "top_logprobs")
