"""The inside of a `coords` attribute while it is written: what stands there, what comes next.

Knows: the order of groups, ids and coordinates in it. Does not know: what stands around it,
tokens. Whatever is read is taken as it is: this guesses, `molmo_core.points` judges.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from molmo_server.engine.drafts.motion import N_DIGITS, LastDigits, Path

_N_WORDS = 3  # of an object in a group: id, x, y
_MAX_TIME_CHARS = 9
_MIDDLE = 500.0

Paths = Mapping[str, Path]
"""By id."""


class CoordsSoFar:
    """`read` each character; `rest` foretells those that follow.

    `groups` are the names that groups may have, in order: moments of a video, or pictures.
    """

    def __init__(self, groups: Sequence[str], last_digits: LastDigits, *, is_track: bool) -> None:
        self._groups = groups
        self._last_digits = last_digits
        self._is_track = is_track
        self._paths: Paths = {}
        self._words: list[str] = []  # of this group: its name, then id, x, y of each object
        self._word = ""
        self._before: list[str] = []  # words of the group in front

    @property
    def n_objects(self) -> int:
        return len(self._paths)

    def read(self, char: str) -> None:
        if char not in ' ;\t"':
            self._word += char
            return
        self._words.append(self._word)
        self._word = ""
        if _ends_object(self._words):
            self._paths = _with_object(self._paths, self._words)
            for word in filter(_is_coordinate, self._words[1 - _N_WORDS :]):
                self._last_digits.count(int(word))
        if char in ";\t":
            self._before, self._words = self._words, []

    def rest(self, closing: Callable[[int], str]) -> Iterator[str]:
        """Pieces to the end of the attribute, then what `closing` makes of the number of objects.

        Ends where nothing is likely.
        """
        words, begun, before = list(self._words), self._word, self._before
        paths = self._paths
        while (word := self._next_word(words, begun, before, paths)) is not None:
            yield word[len(begun) :]
            words.append(word)
            begun = ""
            if _ends_object(words):
                paths = _with_object(paths, words)
            if not _ends_object(words) or self._next_id(words, before):
                yield " "
            elif self._is_track and self._groups_behind(words):
                yield ";"
                words, before = [], words
            else:
                yield closing(len(paths))
                return

    def _next_word(
        self, words: list[str], begun: str, before: list[str], paths: Paths
    ) -> str | None:
        """The likeliest word behind `words` that starts with `begun`."""
        if not words:
            return next((n for n in self._groups_behind(before) if n.startswith(begun)), None)
        if len(words) % _N_WORDS == 1:
            object_id = self._next_id(words, before) or str(len(paths) + 1)
            return object_id if object_id.startswith(begun) else begun
        if len(begun) >= N_DIGITS:
            return begun
        if begun and not begun.isdecimal():
            return None
        axis = (len(words) - 2) % _N_WORDS
        path = paths.get(words[-1 - axis])
        forecast = path.at(_seconds(words[0]), axis) if path else _MIDDLE
        return self._last_digits.write(forecast, begun)

    def _groups_behind(self, words: list[str]) -> Sequence[str]:
        """Names of groups that may follow the one of `words`; without words all."""
        if not words:
            return self._groups
        if words[0] not in self._groups:
            return ()
        return self._groups[self._groups.index(words[0]) + 1 :]

    def _next_id(self, words: list[str], before: list[str]) -> str | None:
        """Objects are expected where they were in the group in front."""
        if not self._is_track:
            return None
        ids = before[1::_N_WORDS]
        if len(words) == 1:
            return ids[0] if ids else "1"
        behind = _latest_index(ids, words[-_N_WORDS]) + 1
        return ids[behind] if behind < len(ids) else None


def _ends_object(words: list[str]) -> bool:
    return len(words) > 1 and len(words) % _N_WORDS == 1


def _with_object(paths: Paths, words: list[str]) -> Paths:
    """`paths` with the last object of a group; unchanged where it has no place."""
    object_id, x, y = words[-_N_WORDS:]
    if not (_is_coordinate(x) and _is_coordinate(y)):
        return paths
    path = paths.get(object_id, Path()).on_to(_seconds(words[0]), int(x), int(y))
    return {**paths, object_id: path}


def _latest_index(ids: list[str], wanted: str) -> int:
    return max((k for k, one in enumerate(ids) if one == wanted), default=len(ids))


def _is_coordinate(word: str) -> bool:
    return word.isdecimal() and len(word) <= N_DIGITS + 1


def _seconds(word: str) -> float:
    """Of a moment; 0 of what is none (pictures have numbers, which are as good)."""
    is_moment = len(word) <= _MAX_TIME_CHARS and word.replace(".", "", 1).isdecimal()
    return float(word) if is_moment else 0.0
