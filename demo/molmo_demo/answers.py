"""One question of the page to a server: the answer as text, as drawing and as JSON.

Knows: the client, the verbs. Does not know: the page (`app`). Everything that goes wrong becomes
a text for the reader. Source: this project's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

from PIL import Image

from molmo_client import Client, MediaInput, terminal
from molmo_client.draw import draw_points, open_image
from molmo_client.draw_video import draw_tracks, tracks_of_points
from molmo_core import api
from molmo_core.errors import MolmoError

MAX_IMAGES = 4
IMAGE_VERBS = ("point", "count", "caption", "ask")
VIDEO_VERBS = ("track", "point", "count", "caption", "ask")


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """`text` is plain text, a model's or an error's: show it, never render it."""

    text: str
    pictures: list[Image.Image] = field(default_factory=list)
    video: str | None = None
    json: dict[str, Any] | None = None


def ask_images(client: Client, paths: Sequence[str], verb: str, text: str) -> Outcome:
    """Ask about 1-4 picture files; every picture comes back with its points drawn on it."""
    if not 1 <= len(paths) <= MAX_IMAGES:
        return Outcome(text=f"Upload 1 to {MAX_IMAGES} pictures first; there are {len(paths)}.")
    try:
        answer, in_words = _ask(client, list(paths), verb, text)
        points = _points_of(answer)
        pictures = [draw_points(path, points, media_index=k) for k, path in enumerate(paths)]
    except MolmoError as failure:
        return Outcome(text=f"Error: {failure.message}", pictures=_plain(paths))
    return Outcome(text=in_words, pictures=pictures, json=answer.model_dump(mode="json"))


def ask_video(
    client: Client, path: str | None, verb: str, text: str, *, folder: str | Path
) -> Outcome:
    """Ask about one video file; the drawn video is a new file in `folder`."""
    if not path:
        return Outcome(text="Upload a video first.")
    try:
        answer, in_words = _ask(client, Path(path), verb, text)
        tracks = [*_tracks_of(answer), *tracks_of_points(_points_of(answer))]
        drawn = _drawn_video(path, tracks, folder) if tracks else None
    except MolmoError as failure:
        return Outcome(text=f"Error: {failure.message}")
    return Outcome(text=in_words, video=drawn, json=answer.model_dump(mode="json"))


def describe_server(client: Client) -> str:
    """One line on who will answer."""
    url = client.connection.url
    try:
        cards = client.models().data
    except MolmoError as failure:
        return f"{url}: {failure.message}"
    return f"{url}: {', '.join(card.checkpoint for card in cards)}"


def _ask(client: Client, media: MediaInput, verb: str, text: str) -> tuple[api.VerbAnswer, str]:
    """The answer, and the answer in words."""
    verbs: Mapping[str, Callable[[], tuple[api.VerbAnswer, str]]] = {
        "point": lambda: _told(client.point(media, text), terminal.point_text),
        "count": lambda: _told(client.count(media, text), terminal.count_text),
        "track": lambda: _told(client.track(media, text), terminal.track_text),
        "caption": lambda: _told(client.caption(media), terminal.caption_text),
        "ask": lambda: _told(client.query(media, text), terminal.query_text),
    }
    return verbs[verb]()


def _told(answer: Any, in_words: Callable[[Any], str]) -> tuple[api.VerbAnswer, str]:
    return answer, in_words(answer)


def _points_of(answer: api.VerbAnswer) -> list[api.Point]:
    if isinstance(answer, api.PointAnswer | api.CountAnswer):
        return answer.points
    return answer.grounding.points if isinstance(answer, api.QueryAnswer) else []


def _tracks_of(answer: api.VerbAnswer) -> list[api.Track]:
    if isinstance(answer, api.TrackAnswer):
        return answer.tracks
    return answer.grounding.tracks if isinstance(answer, api.QueryAnswer) else []


def _plain(paths: Sequence[str]) -> list[Image.Image]:
    """The pictures as they are, those that can be opened."""
    pictures = []
    for path in paths:
        try:
            pictures.append(open_image(path))
        except MolmoError:
            continue
    return pictures


def _drawn_video(path: str, tracks: Sequence[api.Track], folder: str | Path) -> str:
    with NamedTemporaryFile(dir=folder, suffix=".mp4", delete=False) as file:
        draw_tracks(path, tracks, file.name)
    return file.name
