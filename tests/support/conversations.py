"""Prompts of every kind, drawn from a seed: text, images of odd sizes, videos, turns, subtitles."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from typing import Any

import av
import numpy as np
from PIL import Image

from molmo_core.api_requests import MediaOptions
from molmo_core.prompts import Subtitle, Turn, render_subtitles

_WORDS = [
    "red",
    "circle",
    "blue",
    "square",
    "count",
    "the",
    "stars",
    "where",
    "is",
    "it",
    "point",
    "to",
    "each",
    "describe",
    "why",
]


@dataclass(frozen=True, kw_only=True)
class Conversation:
    name: str
    turns: tuple[Turn, ...]
    images: tuple[bytes, ...] = ()
    """PNG files."""
    video: bytes | None = None
    subtitles: str = ""
    options: MediaOptions = field(default_factory=MediaOptions)

    def messages(self) -> list[dict[str, Any]]:
        """As an OpenAI client sends it; media stand in the first message."""
        media = [_part("image_url", "image/png", image) for image in self.images]
        if self.video is not None:
            media.append(_part("video_url", "video/mp4", self.video))
        first, *later = self.turns
        content = [*media, {"type": "text", "text": first.text}]
        return [
            {"role": first.role, "content": content},
            *({"role": turn.role, "content": turn.text} for turn in later),
        ]


def _part(kind: str, mime: str, data: bytes) -> dict[str, Any]:
    return {"type": kind, kind: {"url": f"data:{mime};base64,{base64.b64encode(data).decode()}"}}


def draw_text(seed: int, n_words: int) -> str:
    chosen = np.random.default_rng(seed).choice(_WORDS, n_words)
    return " ".join(chosen).capitalize() + "?"


@lru_cache(maxsize=64)
def draw_image(width_px: int, height_px: int, seed: int, mode: str = "RGB") -> bytes:
    """A PNG of coloured blocks and noise, different for every seed."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (7, 5, 3), dtype=np.uint8)
    picture = Image.fromarray(blocks).resize((width_px, height_px), Image.Resampling.BICUBIC)
    noisy = np.asarray(picture).astype(int) + rng.integers(-20, 21, (height_px, width_px, 3))
    pixels = noisy.clip(0, 255).astype(np.uint8)
    if mode == "RGBA":
        alpha = rng.integers(0, 256, (height_px, width_px, 1), dtype=np.uint8)
        pixels = np.concatenate([pixels, alpha], axis=2)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@lru_cache(maxsize=32)
def draw_video(rate: Fraction, n_frames: int, seed: int, size_wh: tuple[int, int]) -> bytes:
    """An mp4 in which a square moves over a gradient."""
    rng = np.random.default_rng(seed)
    width, height = size_wh
    field = np.asarray(
        Image.fromarray(rng.integers(0, 256, (3, 4, 3), dtype=np.uint8)).resize(size_wh)
    )
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": "20", "g": "24"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for k in range(n_frames):
            pixels = field.copy()
            x, y = (3 * k) % (width - 20), (2 * k) % (height - 20)
            pixels[y : y + 20, x : x + 20] = rng.integers(0, 256, 3)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def _ask(text: str) -> tuple[Turn, ...]:
    return (Turn(role="user", text=text),)


def _talk(seed: int, n_turns: int) -> tuple[Turn, ...]:
    """User and assistant in turn, the user last; `n_turns` is odd."""
    roles = ("user", "assistant")
    return tuple(
        Turn(role=roles[k % 2], text=draw_text(seed + k, 2 + (seed + k) % 5))
        for k in range(n_turns)
    )


_IMAGE_SIZES = [
    (57, 43), (378, 378), (640, 480), (200, 760), (1024, 300), (112, 900), (301, 199),
    (500, 500), (1, 1), (113, 225), (720, 405), (33, 610),
]  # fmt: skip
_VIDEOS = [
    (Fraction(24), 60, (160, 120)), (Fraction(25), 13, (96, 200)),
    (Fraction(30000, 1001), 121, (128, 128)), (Fraction(24), 1, (64, 64)),
    (Fraction(30000, 1001), 31, (320, 180)), (Fraction(25), 77, (120, 160)),
    (Fraction(1), 4, (64, 48)), (Fraction(24), 145, (80, 60)),
]  # fmt: skip
_SPOKEN = (
    Subtitle(start_s=0.0, end_s=1.4, text="here it comes"),
    Subtitle(start_s=1.5, end_s=2.0, text="there it goes"),
)


_FEW = (
    "text-0", "text-2", "text-4",
    "image-57x43", "image-200x760", "image-1024x300", "image-1x1", "image-rgba",
    "images-2", "images-3", "images-4",
    "video-0", "video-1", "video-2", "video-3", "video-6",
    "turns-3-images-0", "turns-5-images-1", "turns-3-images-2",
    "subtitles-0", "subtitles-3",
)  # fmt: skip


def few_conversations() -> list[Conversation]:
    """Some of each kind, at most 2401 tokens long: what every run of the suite compares."""
    return [c for c in many_conversations() if c.name in _FEW]


def many_conversations() -> list[Conversation]:
    """At least 40, of every kind."""
    conversations = [
        Conversation(name=f"text-{k}", turns=_ask(draw_text(k, 3 + 9 * k))) for k in range(5)
    ]
    conversations += [
        Conversation(
            name=f"image-{w}x{h}", turns=_ask(draw_text(k, 4)), images=(draw_image(w, h, k),)
        )
        for k, (w, h) in enumerate(_IMAGE_SIZES)
    ]
    conversations.append(
        Conversation(
            name="image-rgba", turns=_ask("What?"), images=(draw_image(300, 200, 5, "RGBA"),)
        )
    )
    for n in (2, 3, 4, 2, 3, 4):
        seed = len(conversations)
        sizes = [_IMAGE_SIZES[(seed + k) % len(_IMAGE_SIZES)] for k in range(n)]
        images = tuple(draw_image(w, h, seed + k) for k, (w, h) in enumerate(sizes))
        repeated = any(c.name == f"images-{n}" for c in conversations)
        name = f"images-{n}{'-again' if repeated else ''}"
        text = draw_text(seed, 3 + seed % 40)
        conversations.append(Conversation(name=name, turns=_ask(text), images=images))
    conversations += [
        Conversation(
            name=f"video-{k}",
            turns=_ask(draw_text(k, 5)),
            video=draw_video(rate, n_frames, k, size),
        )
        for k, (rate, n_frames, size) in enumerate(_VIDEOS)
    ]
    for k in range(6):
        n_turns, n_images = 3 + 2 * (k % 2), k % 3
        images = tuple(draw_image(200 + 90 * k, 310, k + i) for i in range(n_images))
        name = f"turns-{n_turns}-images-{n_images}{'-again' if k >= 6 else ''}"
        conversations.append(Conversation(name=name, turns=_talk(k, n_turns), images=images))
    conversations += [
        Conversation(
            name=f"subtitles-{k}",
            turns=_talk(k, 1 + 2 * (k // 2)),
            video=draw_video(Fraction(25), 60 + 10 * k, 90 + k, (160, 90)),
            subtitles=render_subtitles(_SPOKEN[: 1 + k % 2]),
        )
        for k in range(4)
    ]
    return conversations
