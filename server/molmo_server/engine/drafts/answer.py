"""What an answer that points will go on with.

Reads an answer piece by piece and foretells its rest: the words of the answer's form, ids, moments
of the video, coordinates of objects that go straight on. A forecast is only ever a draft: the
model decides.

Knows: the form of answers (`molmo_core.points.render`). Does not know: prompts, tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from molmo_core.points import NO_TRACKS_TEXT, NONE_TEXT
from molmo_core.tokens import TURN_END
from molmo_server.engine.drafts.asked import Asked
from molmo_server.engine.drafts.coords import CoordsSoFar
from molmo_server.engine.drafts.motion import LastDigits

_COORDS = 'coords="'
_POINTS, _TRACKS, _COUNTING = "<points ", "<tracks ", "Counting the "


class AnswerSoFar:
    """`read` what was written, then `rest` tells what may follow."""

    def __init__(self, asked: Asked) -> None:
        self._groups = asked.groups
        self._label = asked.label
        self._last_digits = LastDigits()
        tags = (_TRACKS, _POINTS) if "track" in asked.question.lower() else (_POINTS, _TRACKS)
        self._forms = (
            *(lead + tag + _COORDS for tag in tags for lead in ("", _COUNTING)),
            NONE_TEXT + TURN_END,
            NO_TRACKS_TEXT + TURN_END,
        )
        self._text = ""
        """What was written, of one of the forms."""
        self._end = ""
        """What follows the label that is being written."""
        self._coords: CoordsSoFar | None = None

    def read(self, text: str) -> None:
        for char in text:
            if self._coords is None:
                self._read_outside(char)
            else:
                self._coords.read(char)
                if char == '"':
                    self._end_coords(self._coords)

    def _read_outside(self, char: str) -> None:
        if char == "<" and self._end:
            self._forms, self._text, self._end = (self._end,), "", ""
        self._text += char
        if char == '"' and self._text.endswith(_COORDS):
            self._coords = self._opened(self._text)

    def _end_coords(self, coords: CoordsSoFar) -> None:
        self._forms = (self._closing(self._text, coords.n_objects),)
        self._end = _end(self._text, coords.n_objects)
        self._text, self._coords = '"', None

    def rest(self) -> Iterator[str]:
        """What follows, in pieces, the likeliest way; ends where nothing is worth a guess."""
        coords, opening = self._coords, self._text
        if coords is None:
            form = next((form for form in self._forms if form.startswith(self._text)), "")
            yield form[len(self._text) :]
            if not form.endswith(_COORDS):
                return
            coords, opening = self._opened(form), form
        yield from coords.rest(partial(self._closing, opening))

    def _opened(self, opening: str) -> CoordsSoFar:
        return CoordsSoFar(self._groups, self._last_digits, is_track=_is_track(opening))

    def _closing(self, opening: str, n_objects: int) -> str:
        return f'">{self._label}{_end(opening, n_objects)}' if self._label else '">'


def _is_track(opening: str) -> bool:
    return opening.rfind(_TRACKS) > opening.rfind(_POINTS)


def _end(opening: str, n_objects: int) -> str:
    tail = f" shows a total of {n_objects}." if _COUNTING in opening else ""
    return f"</{'tracks' if _is_track(opening) else 'points'}>{tail}{TURN_END}"
