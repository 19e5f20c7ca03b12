"""Answers in words for a terminal.

Knows: the answer types, and that a model's text is not to be trusted with a terminal. Does not
know: commands, options, exit codes. Source: this project's own.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

from molmo_core import api


def say(text: str) -> None:
    """One answer, on standard output."""
    sys.stdout.write(f"{text}\n")


def remark(text: str) -> None:
    """Anything that is not the answer, on standard error."""
    sys.stderr.write(f"{text}\n")


def shown(text: str) -> str:
    """`text` without the control characters that could steer a terminal; lines are kept."""
    return "".join(
        letter if letter.isprintable() or letter == "\n" else "\N{REPLACEMENT CHARACTER}"
        for letter in text
    )


def point_text(answer: api.PointAnswer) -> str:
    if not answer.points:
        return (
            shown(answer.text) if answer.status == "none" else f"No points in: {shown(answer.text)}"
        )
    return "\n".join([f"{answer.count} found", *_point_lines(answer.points)])


def count_text(answer: api.CountAnswer) -> str:
    """The number alone, to be used by other programs (a line for each of several objects); the
    text of an answer without one."""
    if answer.objects:
        return "\n".join(
            f"{'-' if one.count is None else one.count} {shown(one.object)}"
            for one in answer.objects
        )
    return str(answer.count) if answer.count is not None else shown(answer.text)


def track_text(answer: api.TrackAnswer) -> str:
    if not answer.tracks:
        return (
            shown(answer.text) if answer.status == "none" else f"No tracks in: {shown(answer.text)}"
        )
    return "\n".join([f"{answer.count} found", *_track_lines(answer.tracks)])


def caption_text(answer: api.CaptionAnswer) -> str:
    return shown(answer.caption)


def query_text(answer: api.QueryAnswer) -> str:
    lines = [shown(answer.answer)]
    lines += _point_lines(answer.grounding.points)
    lines += _track_lines(answer.grounding.tracks)
    return "\n".join(lines)


def warning_lines(warnings: Iterable[api.GroundingWarning]) -> list[str]:
    return [f"molmo: warning: {warning.code}: {shown(warning.message)}" for warning in warnings]


def _nothing(answer: api.PointingAnswer, places: str) -> str:
    said = shown(answer.text)
    return said if answer.status == "none" else f"No {places} in: {said}"


def _point_lines(points: Sequence[api.Point]) -> list[str]:
    return [
        f"{point.id:>3}  {_moment(point.t, point.frame)}{_place(point)}"
        + _sureness(point.confidence)
        + (f"  {shown(point.label)}" if point.label else "")
        for point in points
    ]


def _track_lines(tracks: Sequence[api.Track]) -> list[str]:
    lines = []
    for track in tracks:
        label = f"  {shown(track.label)}" if track.label else ""
        lines.append(f"track {track.id}{label}")
        lines += [
            f"     {_moment(at.t, at.frame)}{_place(at)}{_sureness(at.confidence)}"
            + ("  interpolated" if at.interpolated else "")
            for at in track.points
        ]
    return lines


def _moment(time_s: float | None, frame: int | None) -> str:
    return "" if time_s is None else f"{time_s:6.2f} s  frame {frame:<5}"


def _place(at: api.Point | api.TrackPoint) -> str:
    return f"x {at.pixel.x:7.1f} px  y {at.pixel.y:7.1f} px"


def _sureness(confidence: float | None) -> str:
    return "" if confidence is None else f"  {100 * confidence:3.0f} %"
