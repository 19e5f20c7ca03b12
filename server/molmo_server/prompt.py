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
from typing import Any

from molmo_core.api_requests import MediaOptions
from molmo_core.errors import ControlTokenInText, InvalidRequest, PromptTooLong
from molmo_core.images import ImageGeometry, count_image_tokens, grid_of
from molmo_core.prompts import Turn, fold_system, render_chat
from molmo_core.tokens import IM_PATCH, IMAGE, VIDEO, find_control_token
from molmo_core.videos import VideoGeometry, frame_tokens, timestamp_text
from molmo_server.checkpoints.folder import Checkpoint
from molmo_server.media.gate import CheckedMedia
from molmo_server.media.handing import MediaFile
from molmo_server.media.options import image_geometry, video_geometry

_LONG_TEXT_CHARS = 20_000
"""From here on counting leaves the event loop: it takes longer than a millisecond or two."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    turns: tuple[Turn, ...]
    """The system text is already folded into the first."""
    media: CheckedMedia
    n_tokens: int
    n_visual_tokens: int
    """Those of them that stand for what is seen."""

    async def messages(self, url_of: Callable[[MediaFile], Awaitable[str]]) -> list[dict[str, Any]]:
        """As the engine's chat endpoint takes them."""
        first, *later = self.turns
        content = [*await self.media.parts(url_of), {"type": "text", "text": first.text}]
        return [
            {"role": first.role, "content": content},
            *({"role": turn.role, "content": turn.text} for turn in later),
        ]


def check_turns(turns: Sequence[Turn], *, system: str = "") -> tuple[Turn, ...]:
    """Refuse texts the model must not see, and fold the system text in.

    Raises ControlTokenInText; InvalidRequest when roles do not alternate or nothing is asked.
    """
    for text in (system, *(turn.text for turn in turns)):
        if token := find_control_token(text):
            raise ControlTokenInText(
                f"got the model's own control token {token!r} in a text; "
                "it cannot be part of a prompt: remove it or spell it differently"
            )
    if not turns or turns[-1].role != "user":
        raise InvalidRequest("the last message must be the user's; add one", param="messages")
    first, *later = turns
    folded = (Turn(role=first.role, text=fold_system(system, first.text)), *later)
    try:
        render_chat(folded)
    except ValueError as error:
        raise InvalidRequest(f"{error}; change the messages", param="messages") from error
    return folded


@dataclass(frozen=True, kw_only=True)
class _Counting:
    """A checkpoint, and the geometry that it looks at this request's media with."""

    checkpoint: Checkpoint
    image: ImageGeometry
    video: VideoGeometry

    def count_tokens(self, text: str) -> int:
        return self.checkpoint.count_tokens(text)


async def measure(
    turns: tuple[Turn, ...],
    media: CheckedMedia,
    checkpoint: Checkpoint,
    options: MediaOptions | None = None,
) -> Prompt:
    """Sample the video's frames and count the prompt's tokens, as `checkpoint` has them.

    Raises PromptTooLong when no room is left for an answer, InvalidRequest for a part of a video
    that it does not have.
    """
    options = options or MediaOptions()
    counting = _Counting(
        checkpoint=checkpoint,
        image=image_geometry(checkpoint.image, options),
        video=video_geometry(checkpoint.video, options),
    )
    media = media.sampled(counting.video)
    text = render_chat(turns, n_images=len(media.images), n_videos=int(media.video is not None))
    at_least = -(-len(text) // checkpoint.longest_token_chars)
    if at_least >= checkpoint.max_model_len:
        raise _too_long(f"at least {at_least:,}", checkpoint)
    if len(text) > _LONG_TEXT_CHARS:
        n_tokens = await asyncio.to_thread(_count, text, media, counting)
    else:
        n_tokens = _count(text, media, counting)
    if n_tokens >= checkpoint.max_model_len:
        raise _too_long(f"{n_tokens:,}", checkpoint)
    n_visual_tokens = _count_visual(media, counting)
    return Prompt(turns=turns, media=media, n_tokens=n_tokens, n_visual_tokens=n_visual_tokens)


def _count(text: str, media: CheckedMedia, by: _Counting) -> int:
    """BOS, the text, and for each placeholder what it unfolds to."""
    n_tokens = 1 + by.count_tokens(text)
    for image in media.images:
        n_tokens += count_image_tokens(image.size_hw, by.image)
    n_tokens -= len(media.images) * by.count_tokens(IMAGE)
    if media.video is not None:
        times = media.video.frame_times_s
        n_tokens += len(times) * len(frame_tokens(by.video))
        stamps = [timestamp_text(t, is_first=k == 0) for k, t in enumerate(times)]
        n_tokens += sum(map(by.count_tokens, stamps)) - by.count_tokens(VIDEO)
    return n_tokens


def _count_visual(media: CheckedMedia, by: _Counting) -> int:
    grids = [grid_of(image.size_hw, by.image) for image in media.images]
    n_tokens = sum(g.low_rows * g.low_cols + g.high_rows * g.high_cols for g in grids)
    if media.video is not None:
        n_tokens += len(media.video.frame_times_s) * frame_tokens(by.video).count(IM_PATCH)
    return n_tokens


def answer_budget(
    prompt: Prompt, checkpoint: Checkpoint, *, asked: int | None, default: int, limit: int
) -> int:
    """Tokens the answer may have.

    Raises InvalidRequest above `limit`, PromptTooLong when prompt and answer do not fit together.
    """
    room = checkpoint.max_model_len - prompt.n_tokens
    if asked is None:
        return min(default, limit, room)
    if asked > limit:
        raise InvalidRequest(
            f"got max_tokens {asked:,}, allowed are {limit:,}; ask for fewer", param="max_tokens"
        )
    if asked > room:
        raise PromptTooLong(
            f"the prompt has {prompt.n_tokens:,} tokens and max_tokens is {asked:,}; together "
            f"{checkpoint.max_model_len:,} are allowed: ask for at most {room:,}",
            param="max_tokens",
        )
    return asked


def _too_long(got: str, checkpoint: Checkpoint) -> PromptTooLong:
    return PromptTooLong(
        f"the prompt has {got} tokens with its media, allowed are {checkpoint.max_model_len - 1:,} "
        "and one for the answer; send a shorter text, fewer images or a shorter video",
        param="messages",
    )
