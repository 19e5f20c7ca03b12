"""Messages of OpenAI's chat, and the conversation that they are.

Knows: roles, parts, fields of messages. Does not know: media checks, token counts, sampling.
Texts of one message are joined without anything between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field

from molmo_core.api_requests import StrictRequest
from molmo_core.prompts import Turn, with_style


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


Message = Annotated[SystemMessage | UserMessage | AssistantMessage, Field(discriminator="role")]


def check_order(messages: Sequence[Any]) -> None:
    """Raises ValueError unless system messages stand before all others."""
    is_system = [isinstance(message, SystemMessage) for message in messages]
    if any(is_system[is_system.count(True) :]):
        raise ValueError("a system message stands after another one; put it first")


def system_text(messages: Sequence[Any]) -> str:
    return "\n".join(_text(m.content) for m in messages if isinstance(m, SystemMessage))


def turns_of(messages: Sequence[Any]) -> list[Turn]:
    return [
        Turn(role=m.role, text=_text(m.content))
        for m in messages
        if not isinstance(m, SystemMessage)
    ]


def media_urls_of(messages: Sequence[Any]) -> tuple[list[str], list[str]]:
    """(images, videos) of all messages, in order."""
    parts = [p for m in messages if isinstance(m, UserMessage) for p in m.content]
    return (
        [p.image_url.url for p in parts if isinstance(p, ImagePart)],
        [p.video_url.url for p in parts if isinstance(p, VideoPart)],
    )


def _text(parts: list[Any]) -> str:
    return "".join(with_style(p.text, p.style) for p in parts if isinstance(p, TextPart))
