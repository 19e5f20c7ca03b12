"""What a prompt asks about: read from its text, as the engine's tokens spell it.

Knows: the layout and the wordings of prompts (`molmo_core.prompts`). Does not know: tokens.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import get_args

from molmo_core.prompts import Verb, verb_prompt
from molmo_core.tokens import FRAME_START, IM_START, LOW_RES_IM_START, TURN_END, TURN_START

_TIME = re.compile(rf"(\d+\.\d) (?:{FRAME_START}|{IM_START})")
_HOLE = "\0"


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The user's last words, and the names of the prompt's moments or pictures in order."""

    question: str
    groups: Sequence[str]

    @property
    def label(self) -> str:
        """What a verb was asked about, as models repeat it; "" of a question in other words."""
        for before, behind in _wordings():
            if self.question.startswith(before) and self.question.endswith(behind):
                named = self.question[len(before) : len(self.question) - len(behind)]
                return named.removeprefix("the ").lower()
        return ""


def read_prompt(text: str) -> tuple[Asked, str]:
    """What was asked, and what is answered so far; of a prompt with the answer behind it."""
    prompt, _, last_turn = text.rpartition(TURN_START)
    answer = last_turn.partition("\n")[2]
    user_turn = prompt.rpartition(TURN_START)[2]
    question = user_turn.partition("\n")[2].partition(TURN_END)[0]
    times = tuple(dict.fromkeys(_TIME.findall(prompt)))
    n_pictures = prompt.count(LOW_RES_IM_START)
    return Asked(question=question, groups=times or _numbers(n_pictures)), answer


def _numbers(n_pictures: int) -> tuple[str, ...]:
    return tuple(str(k + 1) for k in range(n_pictures))


@lru_cache(maxsize=1)
def _wordings() -> tuple[tuple[str, str], ...]:
    """Of the verbs' prompts: what stands in front of the object and behind it, longest first."""
    prompts = {
        verb_prompt(verb, _HOLE, n_images=n_images, has_video=has_video)
        for verb in get_args(Verb)
        for n_images, has_video in ((1, False), (2, False), (0, True))
    }
    parted = [prompt.partition(_HOLE) for prompt in sorted(prompts, key=len, reverse=True)]
    return tuple((before, behind) for before, hole, behind in parted if hole and before)
