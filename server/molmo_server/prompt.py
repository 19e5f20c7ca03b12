"""From checked text and media to what the engine is asked, with the exact prompt length.

The gateway lays a conversation out as the model was trained: all media first, a system text
folded into the first user text. The engine's chat template then has nothing left to decide, and
the tokens counted here are the tokens the engine sees.

Knows: chat layout (through `molmo_core.prompts`), token counts. Does not know: HTTP, sampling.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from molmo_core.api_requests import MediaOptions
from molmo_core.errors import ControlTokenInText, InvalidRequest, PromptTooLong
from molmo_core.images import count_image_tokens, grid_of
from molmo_core.prompts import Turn, fold_system, render_chat
from molmo_core.tokens import IM_PATCH, IMAGE, VIDEO, find_control_token
from molmo_core.videos import frame_tokens, timestamp_text
from molmo_server.checkpoints.folder import Checkpoint
from molmo_server.media.gate import CheckedMedia
from molmo_server.media.handing import MediaFile
from molmo_server.media.options import looking_closer

_LONG_TEXT_CHARS = 20_000
"""From here on counting leaves the event loop: it takes longer than a millisecond or two."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    turns: tuple[Turn, ...]
    """The system text is already folded into the first."""
    text: str
    """With placeholders for the media."""
    media: CheckedMedia
    checkpoint: Checkpoint
    """With the geometry that the request asked for."""
    n_visual_tokens: int
    """Those of `n_tokens` that stand for what is seen."""

    @cached_property
    def n_tokens(self) -> int:
        """Counted when asked for: a millisecond for 4000 characters."""
        return _count(self.text, self.media, self.checkpoint)

    @cached_property
    def _most_tokens(self) -> int:
        """At least `n_tokens`: every token stands for a byte or more."""
        # Composing characters (NFC) may at worst make three bytes of one.
        n_bytes = len(self.text) if self.text.isascii() else 3 * len(self.text.encode())
        return 1 + n_bytes + _count_media(self.media, self.checkpoint)

    def fits_with(self, n_answer_tokens: int) -> bool:
        """Whether the model has room for prompt and answer; seldom has to count."""
        room = self.checkpoint.max_model_len - n_answer_tokens
        return self._most_tokens <= room or self.n_tokens <= room

    def visual_usage(self) -> dict[str, int]:
        """Visual tokens by kind, as an answer's `usage.prompt_tokens_details` has them."""
        name = "image_tokens" if self.media.video is None else "video_tokens"
        return {name: self.n_visual_tokens} if self.n_visual_tokens else {}

    async def messages(self, url_of: Callable[[MediaFile], Awaitable[str]]) -> list[dict[str, Any]]:
        """As the engine's chat endpoint takes them."""
        first, *later = self.turns
        content = [*await self.media.parts(url_of), {"type": "text", "text": first.text}]
        return [
            {"role": first.role, "content": content},
            *({"role": turn.role, "content": turn.text} for turn in later),
        ]


def check_text(text: str) -> None:
    """Raises ControlTokenInText for what the model must not see as text."""
    if token := find_control_token(text):
        raise ControlTokenInText(
            f"got the model's own control token {token!r} in a text; "
            "it cannot be part of a prompt: remove it or spell it differently"
        )


def check_turns(
    turns: Sequence[Turn], *, system: str = "", is_continued: bool = False
) -> tuple[Turn, ...]:
    """Refuse texts the model must not see, and fold the system text in.

    `is_continued`: the last turn may be the assistant's, which the answer goes on from. Raises
    ControlTokenInText; InvalidRequest when roles do not alternate or nothing is asked.
    """
    for text in (system, *(turn.text for turn in turns)):
        check_text(text)
    if not turns or (turns[-1].role != "user" and not is_continued):
        raise InvalidRequest("the last message must be the user's; add one", param="messages")
    first, *later = turns
    folded = (Turn(role=first.role, text=fold_system(system, first.text)), *later)
    try:
        render_chat(folded)
    except ValueError as error:
        raise InvalidRequest(f"{error}; change the messages", param="messages") from error
    return folded


async def measure(
    turns: tuple[Turn, ...],
    media: CheckedMedia,
    checkpoint: Checkpoint,
    options: MediaOptions | None = None,
) -> Prompt:
    """Sample the video's frames and see that the prompt fits, as `checkpoint` has it.

    Raises PromptTooLong when no room is left for an answer, InvalidRequest for a part of a video
    that it does not have.
    """
    seen_by = checkpoint if options is None else looking_closer(checkpoint, options)
    media = media.sampled(seen_by.video)
    text = render_chat(turns, n_images=len(media.images), n_videos=int(media.video is not None))
    at_least = -(-len(text) // checkpoint.longest_token_chars)
    if at_least >= checkpoint.max_model_len:
        raise too_long(f"at least {at_least:,}", checkpoint)
    prompt = Prompt(
        turns=turns,
        text=text,
        media=media,
        checkpoint=seen_by,
        n_visual_tokens=_count_visual(media, seen_by),
    )
    if len(text) > _LONG_TEXT_CHARS:
        await asyncio.to_thread(lambda: prompt.n_tokens)
    if not prompt.fits_with(1):
        raise too_long(f"{prompt.n_tokens:,}", checkpoint)
    return prompt


def _count(text: str, media: CheckedMedia, checkpoint: Checkpoint) -> int:
    """BOS, the text, and for each placeholder what it unfolds to."""
    n_tokens = 1 + checkpoint.count_tokens(text) + _count_media(media, checkpoint)
    if media.images:
        n_tokens -= len(media.images) * checkpoint.count_tokens(IMAGE)
    if media.video is not None:
        n_tokens -= checkpoint.count_tokens(VIDEO)
    return n_tokens


def _count_media(media: CheckedMedia, checkpoint: Checkpoint) -> int:
    """What the placeholders unfold to."""
    n_tokens = sum(count_image_tokens(one.size_hw, checkpoint.image) for one in media.images)
    if media.video is not None:
        times = media.video.frame_times_s
        n_tokens += len(times) * len(frame_tokens(checkpoint.video))
        stamps = [timestamp_text(t, is_first=k == 0) for k, t in enumerate(times)]
        n_tokens += sum(map(checkpoint.count_tokens, stamps))
    return n_tokens


def _count_visual(media: CheckedMedia, checkpoint: Checkpoint) -> int:
    grids = [grid_of(image.size_hw, checkpoint.image) for image in media.images]
    n_tokens = sum(g.low_rows * g.low_cols + g.high_rows * g.high_cols for g in grids)
    if media.video is not None:
        n_tokens += len(media.video.frame_times_s) * frame_tokens(checkpoint.video).count(IM_PATCH)
    return n_tokens


def check_values(n_tokens: int, *, limit: int) -> None:
    """Raises PromptTooLong for a prompt whose log-probabilities are too many to be told."""
    if n_tokens > limit:
        raise PromptTooLong(
            f"the prompt has {n_tokens:,} tokens with its media, log-probabilities are told of at "
            f"most {limit:,}; send a shorter prompt, or leave them out"
        )


def answer_budget(prompt: Prompt, *, asked: int | None, default: int, limit: int) -> int:
    """Tokens the answer may have.

    Raises InvalidRequest above `limit`, PromptTooLong when prompt and answer do not fit together.
    """
    if asked is not None and asked > limit:
        raise InvalidRequest(
            f"got max_tokens {asked:,}, allowed are {limit:,}; ask for fewer", param="max_tokens"
        )
    wanted = min(default, limit) if asked is None else asked
    if prompt.fits_with(wanted):
        return wanted
    most = prompt.checkpoint.max_model_len
    room = most - prompt.n_tokens
    if asked is not None:
        raise PromptTooLong(
            f"the prompt has {prompt.n_tokens:,} tokens and max_tokens is {asked:,}; together "
            f"{most:,} are allowed: ask for at most {room:,}",
            param="max_tokens",
        )
    return room


def too_long(got: str, checkpoint: Checkpoint, *, param: str = "messages") -> PromptTooLong:
    return PromptTooLong(
        f"the prompt has {got} tokens with its media, allowed are {checkpoint.max_model_len - 1:,} "
        "and one for the answer; send a shorter text, fewer images or a shorter video",
        param=param,
    )
