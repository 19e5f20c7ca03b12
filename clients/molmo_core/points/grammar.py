"""Grammars of answers that point, for engines that decode under one: what they allow is all right.

A grammar allows exactly the answers that `render` writes and nothing that the parser would warn
of: coordinates 000 to 1000, images and moments in order and only those that there are, ids that
count on from 1, and a count that agrees. A label has no `<` and `>`, and ends with its line. Text
is in the notation of xgrammar (GBNF).

Knows: forms of answers. Does not know: engines, tokens, prompts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

from molmo_core.points.render import NO_TRACKS_TEXT, NONE_TEXT

MAX_OBJECTS = 64
"""Of a tracks grammar: ids that may appear."""
_SHARED = (
    'coord ::= [0-9] [0-9] [0-9] | "1000"',
    'xy ::= " " coord " " coord',
    r"label ::= [^<>\x00-\x1f]+",
)


def points_grammar(
    *,
    n_media: int = 1,
    times_s: Sequence[float] = (),
    max_points: int,
    is_counted: bool = False,
    is_ordered: bool = True,
) -> str:
    """Answers with one `<points>` tag, or that there are none.

    Groups are images 1 to `n_media`, or with `times_s` the moments of a video, seconds.
    `is_counted`: the sentence around the tag tells how many. Raises ValueError without a group or
    a point.

    Order costs a rule for every pair of group and id; without `is_ordered` groups may come in any
    order, and again.
    """
    groups = frame_texts(times_s) if times_s else [str(k + 1) for k in range(n_media)]
    if not groups or max_points < 1:
        raise ValueError(
            f"got {len(groups)} images or moments and max_points {max_points}; at least 1 of each"
        )
    lead = "Counting the " if is_counted else ""
    first = "open_0_1" if is_ordered else "open_1"
    rules = [
        f'root ::= "{NONE_TEXT}" | "{lead}<points coords=\\"" {first}',
        *(_in_order(groups, max_points) if is_ordered else _in_any_order(groups, max_points)),
        *(_closing(n, is_counted=is_counted) for n in range(1, max_points + 1)),
        *_SHARED,
    ]
    return "\n".join(rules) + "\n"


def _in_order(groups: Sequence[str], max_points: int) -> Iterator[str]:
    yield from _openings(groups, max_points)
    yield from _continuations(groups, max_points)


def _in_any_order(groups: Sequence[str], max_points: int) -> Iterator[str]:
    yield "group ::= " + " | ".join(f'"{name}"' for name in groups)
    for k in range(1, max_points + 1):
        yield f'open_{k} ::= group " {k}" xy more_{k}'
        choices = [f"close_{k}"]
        if k < max_points:
            choices += [f'" {k + 1}" xy more_{k + 1}', f'";" open_{k + 1}']
        yield f"more_{k} ::= {' | '.join(choices)}"


def _openings(groups: Sequence[str], max_points: int) -> Iterator[str]:
    """`open_g_k`: point k is the first of group g, or of a later one."""
    for k in range(1, max_points + 1):
        for g, name in enumerate(groups):
            later = f" | open_{g + 1}_{k}" if g + 1 < len(groups) else ""
            yield f'open_{g}_{k} ::= "{name} {k}" xy more_{g}_{k}{later}'


def _continuations(groups: Sequence[str], max_points: int) -> Iterator[str]:
    """`more_g_k`: point k was written, in group g."""
    for k in range(1, max_points + 1):
        for g in range(len(groups)):
            choices = [f"close_{k}"]
            if k < max_points:
                choices.append(f'" {k + 1}" xy more_{g}_{k + 1}')
                if g + 1 < len(groups):
                    choices.append(f'";" open_{g + 1}_{k + 1}')
            yield f"more_{g}_{k} ::= {' | '.join(choices)}"


def _closing(n_points: int, *, is_counted: bool) -> str:
    tail = f" shows a total of {n_points}." if is_counted else ""
    return f'close_{n_points} ::= "\\">" label "</points>{tail}"'


def tracks_grammar(times_s: Sequence[float], *, max_objects: int = MAX_OBJECTS) -> str:
    """Answers with one `<tracks>` tag over the moments `times_s`, seconds, or that there are none.

    In a moment ids ascend; that they count on from 1 over the moments is left to the model, it
    would need a rule for each moment and number of ids. Raises ValueError without a moment or an
    object.
    """
    names = frame_texts(times_s)
    if not names or max_objects < 1:
        raise ValueError(
            f"got {len(names)} moments and max_objects {max_objects}; at least 1 of each is needed"
        )
    last = len(names) - 1
    rules = [
        f'root ::= "{NONE_TEXT}" | "{NO_TRACKS_TEXT}" | "<tracks coords=\\"" at_0',
        *(
            f'at_{f} ::= "{name}" ids_1 then_{f}' + (f" | at_{f + 1}" if f < last else "")
            for f, name in enumerate(names)
        ),
        *(f'then_{f} ::= close | ";" at_{f + 1}' for f in range(last)),
        f"then_{last} ::= close",
        *(
            f'ids_{k} ::= " {k}" xy more_{k}' + (f" | ids_{k + 1}" if k < max_objects else "")
            for k in range(1, max_objects + 1)
        ),
        *(f'more_{k} ::= "" | ids_{k + 1}' for k in range(1, max_objects)),
        f'more_{max_objects} ::= ""',
        'close ::= "\\">" label "</tracks>"',
        *_SHARED,
    ]
    return "\n".join(rules) + "\n"


def frame_texts(times_s: Sequence[float]) -> list[str]:
    """Moments as they are written, in order; two that are written alike are one.

    Raises ValueError when they do not ascend.
    """
    if any(b < a for a, b in pairwise(times_s)):
        raise ValueError("the moments of a video must ascend")
    return list(dict.fromkeys(f"{time_s:.1f}" for time_s in times_s))
