"""Tracks on a video: the stream decoded, dots with trails drawn on it, and encoded again.

One frame is in memory at a time. Between two moments that the model saw, a dot moves on a
straight line; over a longer gap it is not shown. Knows: codecs, time. Does not know: HTTP, what
dots look like (`draw`). The written file has no sound. Source: this project's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image, ImageDraw

from molmo_client.draw import Rgb, Style, colour_of, draw_dot, draw_tag
from molmo_core.api import Point, Track, TrackPoint
from molmo_core.errors import InvalidMedia

TRAIL_S = 1.0
_SHOWN_ALONE_S = 0.25  # either way, before the first, after the last and around a lone moment
_GAP_STEPS = 1.5  # more than this many sampling steps apart: the object was lost in between
_BT709 = 1  # the colour matrix that the encoder is fed with, written into the stream
_EVEN = 2  # 4:2:0 video has even sides


@dataclass(frozen=True, kw_only=True, slots=True)
class Path2d:
    """One object over time: ascending `times_s`, `x` and `y` in 0-1; `gap_s` ends a line."""

    name: str
    colour: Rgb
    times_s: np.ndarray
    x: np.ndarray
    y: np.ndarray
    gap_s: float

    def at(self, time_s: float) -> tuple[float, float] | None:
        """Where the dot is; None when the object is not shown."""
        after = int(np.searchsorted(self.times_s, time_s, side="right"))
        before = after - 1
        is_between = before >= 0 and after < len(self.times_s)
        if is_between and self.times_s[after] - self.times_s[before] <= self.gap_s:
            return (
                float(np.interp(time_s, self.times_s, self.x)),
                float(np.interp(time_s, self.times_s, self.y)),
            )
        nearest = int(np.abs(self.times_s - time_s).argmin())
        if abs(self.times_s[nearest] - time_s) > _SHOWN_ALONE_S:
            return None
        return float(self.x[nearest]), float(self.y[nearest])

    def trail(self, time_s: float) -> list[list[tuple[float, float]]]:
        """Lines of the last second up to `time_s`; a gap parts them."""
        lines: list[list[tuple[float, float]]] = []
        line: list[tuple[float, float]] = []
        for moment_s in np.linspace(time_s - TRAIL_S, time_s, 25):
            place = self.at(float(moment_s))
            if place is not None:
                line.append(place)
            elif line:
                lines.append(line)
                line = []
        return [kept for kept in (*lines, line) if len(kept) > 1]


def draw_tracks(video: str | Path, tracks: Sequence[Track], out: str | Path) -> int:
    """Write `video` with `tracks` drawn on it to `out` (mp4, H.264); returns the frames written.

    Raises InvalidMedia when the video cannot be read or the file cannot be written; `out` is
    then left as it was.
    """
    finished = Path(out)
    started = finished.with_name(f".{finished.name}.part")
    try:
        n_frames = _reencode(str(video), str(started), _paths(tracks))
        started.replace(finished)
    except (av.FFmpegError, OSError, ValueError) as failure:
        raise InvalidMedia(
            f"cannot draw {video} to {out}: {failure}; use a complete video and a writable .mp4"
        ) from failure
    finally:
        started.unlink(missing_ok=True)
    return n_frames


def tracks_of_points(points: Sequence[Point]) -> list[Track]:
    """Points of a video, one track for each object that the model numbered."""
    by_object: dict[tuple[str | None, int], list[TrackPoint]] = {}
    for point in sorted(points, key=lambda point: point.t or 0.0):
        place = TrackPoint(
            t=point.t or 0.0, frame=point.frame or 0, x=point.x, y=point.y, pixel=point.pixel
        )
        by_object.setdefault((point.label, point.id), []).append(place)
    return [
        Track(id=number, label=label, points=places)
        for (label, number), places in by_object.items()
    ]


def _paths(tracks: Sequence[Track]) -> list[Path2d]:
    moments_s = sorted({point.t for track in tracks for point in track.points})
    steps_s = np.diff(moments_s)
    gap_s = _GAP_STEPS * float(np.median(steps_s)) if len(steps_s) else 0.0
    return [
        Path2d(
            name=str(track.id),
            colour=colour_of(index),
            times_s=np.array([point.t for point in track.points]),
            x=np.array([point.x for point in track.points]),
            y=np.array([point.y for point in track.points]),
            gap_s=gap_s,
        )
        for index, track in enumerate(tracks)
        if track.points
    ]


def _reencode(source: str, target: str, paths: Sequence[Path2d]) -> int:
    n_frames = 0
    with av.open(source) as reader, av.open(target, "w", format="mp4") as writer:
        if not reader.streams.video:
            raise InvalidMedia(f"{source} has no video stream; use an mp4 or another video")
        stream = reader.streams.video[0]
        # Whole even frame rates only matter to players that ignore times; times are exact.
        encoder = writer.add_stream("libx264", rate=stream.average_rate or Fraction(25))
        encoder.pix_fmt = "yuv420p"
        encoder.codec_context.thread_count = 1
        encoder.codec_context.colorspace = _BT709
        encoder.codec_context.time_base = stream.time_base or Fraction(1, 90_000)
        for time_s, frame in _decoded(reader, stream):
            image = _upright(frame)
            _draw_at(image, time_s, paths)
            if n_frames == 0:
                encoder.width, encoder.height = image.size
            drawn = av.VideoFrame.from_ndarray(np.asarray(image), format="rgb24")
            drawn.pts, drawn.time_base = frame.pts, frame.time_base
            writer.mux(encoder.encode(drawn.reformat(format="yuv420p", dst_colorspace="ITU709")))
            n_frames += 1
        if n_frames == 0:
            raise InvalidMedia(f"{source} has no frames; use a complete video")
        writer.mux(encoder.encode())
    return n_frames


def _decoded(reader: Any, stream: Any) -> Iterator[tuple[float, av.VideoFrame]]:
    """(seconds from the first frame, frame); frames without a time are left out."""
    first_s: float | None = None
    for frame in reader.decode(stream):
        if frame.time is None:
            continue
        first_s = frame.time if first_s is None else first_s
        yield frame.time - first_s, frame


def _upright(frame: av.VideoFrame) -> Image.Image:
    """As it is displayed, with even sides."""
    pixels = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90) % 4)
    height_px, width_px = (side - side % _EVEN for side in pixels.shape[:2])
    return Image.fromarray(np.ascontiguousarray(pixels[:height_px, :width_px]))


def _draw_at(image: Image.Image, time_s: float, paths: Sequence[Path2d]) -> None:
    style, draw = Style.for_size(*image.size), ImageDraw.Draw(image)
    width_px, height_px = image.size
    for path in paths:
        for line in path.trail(time_s):
            pixels = [(x * width_px, y * height_px) for x, y in line]
            draw.line(pixels, fill=path.colour, width=1 + style.ring_px, joint="curve")
    places = [(path, path.at(time_s)) for path in paths]
    shown = [(path, x * width_px, y * height_px) for path, xy in places if xy for x, y in [xy]]
    for path, x_px, y_px in shown:
        draw_tag(draw, x_px, y_px, path.name, path.colour, style, image.size)
    for path, x_px, y_px in shown:  # after all tags: no number may hide a dot
        draw_dot(draw, x_px, y_px, path.colour, style)
