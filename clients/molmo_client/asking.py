"""The verbs of the `molmo` command: one question to a server, one answer on the terminal.

Knows: options of a question and what is done with its answer. Does not know: the other commands
(`__main__`), how errors become exit codes. Source: this project's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeVar

from cyclopts import Parameter
from pydantic import ValidationError

from molmo_client import terminal
from molmo_client.calls import Generation
from molmo_client.client import Client
from molmo_client.draw import IMAGE_SUFFIXES, draw_points, save_image
from molmo_client.failures import WrongUsage
from molmo_client.media import EncodedMedia, encode
from molmo_core import api

Answer = TypeVar("Answer", bound=api.VerbAnswer)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of every question."""

    server: Annotated[
        str | None, Parameter(help="Address; else MOLMO_SERVER, else port 8000 here")
    ] = None
    json: Annotated[bool, Parameter(negative=(), help="Print the whole answer as JSON")] = False
    model: Annotated[
        str | None, Parameter(help="Served model to ask; else the one that is served")
    ] = None
    max_tokens: Annotated[int | None, Parameter(help="Longest answer")] = None
    max_crops: Annotated[int | None, Parameter(help="Most tiles of a picture, 1 to 24")] = None
    max_frames: Annotated[int | None, Parameter(help="Most frames of a video")] = None
    fps: Annotated[float | None, Parameter(help="Frames of a video a second")] = None
    start: Annotated[float | None, Parameter(help="Look at a video from this second on")] = None
    end: Annotated[float | None, Parameter(help="Look at a video to this second")] = None

    def client(self) -> Client:
        return Client(self.server)

    def generation(self) -> Generation:
        names = ("max_crops", "max_frames", "fps", "start", "end")
        asked = {name: v for name in names if (v := getattr(self, name)) is not None}
        return Generation(model=self.model, max_tokens=self.max_tokens, media_options=asked or None)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class PointingOptions(Options):
    """Options of the questions that are answered with places."""

    confidence: Annotated[
        bool, Parameter(negative=(), help="Tell how sure the model was of each place")
    ] = False
    max_points: Annotated[int | None, Parameter(help="Most points, or tracks, of each object")] = (
        None
    )
    free: Annotated[
        bool, Parameter(negative=(), help="Do not hold the answer to the verb's grammar")
    ] = False

    def generation(self) -> Generation:
        return {
            **super().generation(),
            "confidence": self.confidence or None,
            "max_points": self.max_points,
            "constrained": False if self.free else None,
        }


Media = Annotated[Path, Parameter(help="A picture or a video")]
Draw = Annotated[
    Path | None,
    Parameter(help="Write the picture (.png) or video (.mp4) with the points drawn on it"),
]
Region = Annotated[
    tuple[float, float, float, float] | None,
    Parameter(negative=(), help="Look only at this part of the picture: X0 Y0 X1 Y1, 0 to 1"),
]
Quiet = Options()
Pointing = PointingOptions()


def point(
    media: Media,
    object: str,
    /,
    *more: str,
    region: Region = None,
    draw: Draw = None,
    options: PointingOptions = Pointing,
) -> None:
    """Point to every OBJECT ("the red circle") in a picture or video, and to MORE of them."""
    encoded = _checked(media, draw)
    asking: Generation = {**options.generation(), "region": _region(region)}
    with options.client() as client:
        answer = client.point(encoded, _all(object, more), **asking)
    _tell(answer, options, terminal.point_text)
    _draw(media, encoded, draw, answer.points, ())


def count(
    media: Media,
    object: str,
    /,
    *more: str,
    region: Region = None,
    draw: Draw = None,
    options: PointingOptions = Pointing,
) -> None:
    """Count the OBJECTs in a picture or video; prints the number, or a line for each of several."""
    encoded = _checked(media, draw)
    asking: Generation = {**options.generation(), "region": _region(region)}
    with options.client() as client:
        answer = client.count(encoded, _all(object, more), **asking)
    _tell(answer, options, terminal.count_text)
    _draw(media, encoded, draw, answer.points, ())


def track(
    video: Media,
    object: str,
    /,
    *more: str,
    frame_rate: Annotated[float | None, Parameter(help="Moments a second in the answer")] = None,
    interpolate: Annotated[
        bool, Parameter(negative=(), help="Places in every frame between those the model saw")
    ] = False,
    draw: Draw = None,
    options: PointingOptions = Pointing,
) -> None:
    """Follow every OBJECT through a video, and MORE of them."""
    encoded = _checked(video, draw)
    asking: Generation = {**options.generation(), "frame_rate": frame_rate}
    if interpolate:
        asking["interpolate"] = True
    with options.client() as client:
        answer = client.track(encoded, _all(object, more), **asking)
    _tell(answer, options, terminal.track_text)
    _draw(video, encoded, draw, (), answer.tracks)


def caption(media: Media, /, *, options: Options = Quiet) -> None:
    """Describe a picture or video in a sentence or two."""
    encoded = _checked(media, None)
    with options.client() as client:
        answer = client.caption(encoded, **options.generation())
    _tell(answer, options, terminal.caption_text)


def ask(media: Media, question: str, /, *, draw: Draw = None, options: Options = Quiet) -> None:
    """Ask any QUESTION about a picture or video."""
    encoded = _checked(media, draw)
    with options.client() as client:
        answer = client.query(encoded, question, **options.generation())
    _tell(answer, options, terminal.query_text)
    _draw(media, encoded, draw, answer.grounding.points, answer.grounding.tracks)


VERBS: tuple[Callable[..., None], ...] = (point, count, track, caption, ask)


def _all(first: str, more: Sequence[str]) -> str | list[str]:
    return [first, *more] if more else first


def _region(corners: tuple[float, float, float, float] | None) -> api.Region | None:
    if corners is None:
        return None
    names = dict(zip(("x0", "y0", "x1", "y1"), corners, strict=True))
    try:
        return api.Region.model_validate(names)
    except ValidationError as failure:
        reason = failure.errors(include_input=False, include_url=False)[0]["msg"]
        raise WrongUsage(f"--region is not one: {reason}") from failure


def _checked(media: Path, draw: Path | None) -> EncodedMedia:
    """The file ready to be sent; a drawing that could not be made is refused before asking."""
    if not media.is_file():
        raise WrongUsage(f"there is no file {media}; name a picture or a video")
    encoded = encode(media)
    if draw is not None:
        _check_drawing(media, encoded, draw)
    return encoded


def _check_drawing(media: Path, encoded: EncodedMedia, draw: Path) -> None:
    kind, allowed = ("picture", IMAGE_SUFFIXES) if encoded.kind == "image" else ("video", (".mp4",))
    if draw.suffix.lower() not in allowed:
        raise WrongUsage(
            f"{media} is a {kind}, --draw got {draw}; name a file that ends in {', '.join(allowed)}"
        )
    if not draw.parent.is_dir():
        raise WrongUsage(f"there is no folder {draw.parent} for --draw; make it, or name another")


def _tell(answer: Answer, options: Options, in_words: Callable[[Answer], str]) -> None:
    terminal.say(answer.model_dump_json(indent=2) if options.json else in_words(answer))
    if not options.json:
        for line in terminal.warning_lines(answer.warnings):
            terminal.remark(line)


def _draw(
    media: Path,
    encoded: EncodedMedia,
    draw: Path | None,
    points: Sequence[api.Point],
    tracks: Sequence[api.Track],
) -> None:
    if draw is None:
        return
    if encoded.kind == "video":
        from molmo_client.draw_video import draw_tracks, tracks_of_points  # loads all of FFmpeg

        draw_tracks(media, [*tracks, *tracks_of_points(points)], draw)
    else:
        save_image(draw_points(encoded, points), draw)
    terminal.remark(f"molmo: wrote {draw}")
