"""Questions about drawn scenes that have one right answer, shared by training and evaluation.

Knows: the wordings, and when a question is unambiguous. Does not know: pixels, prompts' layout.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from molmo_core.scenes import Kind


def attribute_questions(objects: Sequence[Kind]) -> list[tuple[str, str]]:
    """(question, answer) for each shape or colour that occurs exactly once.

    "What colour is the star?" → "blue"; "What shape is the blue object?" → "star".
    """
    shapes = Counter(o.shape for o in objects)
    colours = Counter(o.colour for o in objects)
    asked = [(f"What colour is the {o.shape}?", o.colour) for o in objects if shapes[o.shape] == 1]
    asked += [
        (f"What shape is the {o.colour} object?", o.shape)
        for o in objects
        if colours[o.colour] == 1
    ]
    return asked
