"""Questions that count, in data whose answers have no points, are told not to be pointed at.

Otherwise the model would learn to answer "how many" without points where they are wanted.
Knows: what counting questions look like; rather one too many than one missed. Does not know:
which datasets need it (rows say `guard_counting`). Source: spec of Molmo2's training, 2.8.
"""

from __future__ import annotations

import re
from functools import cache

import numpy as np

from molmo_training.data.formatting.templates import load_table

# What follows "how many" when it asks for a quantity that cannot be pointed at.
_UNITS = (
    "seconds?|minutes?|hours?|days?|weeks?|months?|years?|decades?|centur(?:y|ies)|times|"
    "mm|cm|m|km|millimet(?:er|re)s?|centimet(?:er|re)s?|met(?:er|re)s?|kilomet(?:er|re)s?|"
    "inch(?:es)?|f(?:oo|ee)t|yards?|miles?|g|kg|grams?|kilograms?|ounces?|pounds?|lbs?|"
    "lit(?:er|re)s?|gallons?|cups?|calories|degrees|percent|points|dollars|euros|cents|"
    "bytes|megabytes|gigabytes|pixels|watts?|volts?|amps?|units|square|cubic"
)
_COUNTING = re.compile(
    rf"\bhow many (?!(?:{_UNITS})\b)\w+"
    r"|\b(?:count|tally) (?:up )?(?:all|every|each|the)\b"
    r"|\bthere (?:are|is) (?:a total of )?_{2,}"
    r"|\ba total of _{2,}"
    r"|\bwhat(?: is|'s) the (?:total |exact )?(?:number|count|amount) of\b",
    re.IGNORECASE,
)
_ESTIMATE = re.compile(r"\s*approximately\b", re.IGNORECASE)


def is_counting_question(question: str) -> bool:
    return not _ESTIMATE.match(question) and _COUNTING.search(question) is not None


@cache
def guard_prefixes() -> tuple[str, ...]:
    return tuple(load_table("counting_guard")["prefixes"])


def guard_counting(question: str, rng: np.random.Generator) -> str:
    """The question, behind a drawn prefix if it counts."""
    if not is_counting_question(question):
        return question
    prefixes = guard_prefixes()
    return prefixes[int(rng.integers(len(prefixes)))] + question
