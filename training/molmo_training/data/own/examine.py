"""One row under examination: what is wrong with it, and how long it is.

Pictures are judged by their headers, and opened whole where their end looks cut off.
Knows: kinds of findings, what makes a row unusable or doubtful. Does not know: files of rows as a
whole (`check`).
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np

from molmo_core.errors import InvalidExample, InvalidMedia, InvalidRequest
from molmo_core.points import NO_TRACKS_TEXT
from molmo_core.tokens import find_control_token
from molmo_training.data.example import Example
from molmo_training.data.formatting.row import Row
from molmo_training.data.own.media import opened_media
from molmo_training.data.own.model_view import ModelView
from molmo_training.data.own.places import PointSpread, examine_places
from molmo_training.data.own.schema import KNOWN_STYLES, questions_of
from molmo_training.data.own.table import OwnTable
from molmo_training.data.tree import UNLIMITED

FindingKind = Literal[
    "row",
    "media missing",
    "media corrupt",
    "points",
    "scale",
    "control token",
    "style",
    "tracks unseen",
    "too long",
    "cut",
    "duplicate",
]
DOUBTFUL = frozenset({"scale", "style", "tracks unseen", "cut", "duplicate"})
"""Such a row can be trained on; whether it should is another question."""


class Finding(NamedTuple):
    """Something that the owner of the data should know."""

    kind: FindingKind
    where: str
    message: str

    @property
    def is_doubtful(self) -> bool:
        return self.kind in DOUBTFUL


@dataclass(frozen=True, kw_only=True)
class RowFacts:
    """What was found out about a row; sizes are 0 for one that cannot be used."""

    index: int
    findings: tuple[Finding, ...] = ()
    digest: bytes = b""
    style: str = ""
    n_tokens: int = 0
    n_answer_tokens: int = 0
    n_crops: int = 0
    spread: PointSpread | None = None

    @property
    def is_usable(self) -> bool:
        return self.n_tokens > 0 and all(found.is_doubtful for found in self.findings)


@dataclass(frozen=True, kw_only=True)
class Examiner:
    """Examines rows of one table as a model sees them."""

    table: OwnTable
    view: ModelView
    opens_media: bool = False
    """Whether every picture and video is opened whole."""

    def __call__(self, index: int) -> RowFacts:
        """Raises nothing: whatever a row or its media hold becomes a finding."""
        try:
            return self._examined(index)
        except Exception as error:  # noqa: BLE001 - files of others may do anything
            message = f"{type(error).__name__}: {error}"
            return RowFacts(index=index, findings=(self._found(index, "row", message),))

    def _examined(self, index: int) -> RowFacts:
        try:
            row = self.table.row(index)
        except InvalidExample as error:
            where, message = self._placed(index, error)
            return RowFacts(index=index, findings=(Finding("row", where, message),))
        facts = RowFacts(index=index, digest=digest_of(row), style=_style_of(row))
        findings = [self._found(index, "style", text, "style") for text in odd_styles(row)]
        findings += [self._found(index, "control token", text) for text in control_tokens(row)]
        media = opened_media(row)
        findings += [self._found(index, kind, text) for kind, text in media.faults]
        if media.faults:
            return replace(facts, findings=tuple(findings))
        try:
            places = examine_places(media.row, media.pictures)
        except InvalidMedia as error:  # the size of a frame may need the frame
            findings.append(self._found(index, "media corrupt", error.message))
            return replace(facts, findings=tuple(findings))
        if places.fault:
            findings.append(self._found(index, "points", places.fault, places.field))
        facts = replace(facts, spread=places.spread)
        if all(finding.is_doubtful for finding in findings):
            facts, more = self._measured(facts, media.row)
            findings += more
        return replace(facts, findings=tuple(findings))

    def _measured(self, facts: RowFacts, row: Row) -> tuple[RowFacts, list[Finding]]:
        index = facts.index
        try:
            # The generator of each row is its own, so that a finding does not depend on others.
            example = self.view.rows(self.table).example_of(row, np.random.default_rng(index))
            whole = replace(self.view.tokenizing, limits=UNLIMITED)
            outline = whole.outline(example)
        except InvalidRequest as error:
            return facts, [self._found(index, "row", error.message)]
        is_learnt = outline.tree.weights > 0
        facts = replace(
            facts,
            n_tokens=len(is_learnt),
            n_answer_tokens=int(is_learnt.sum()),
            n_crops=outline.n_crops,
        )
        findings = [self._found(index, *found) for found in _over(facts, example, self.view)]
        if _has_unseen_tracks(row, example):
            text = "no annotated moment falls on a frame that is sampled: see sampling_fps"
            findings.append(self._found(index, "tracks unseen", text, "tracks"))
        if self.opens_media:
            try:
                whole.finish(example, outline)
            except InvalidMedia as error:
                findings.append(self._found(index, "media corrupt", error.message))
        return facts, findings

    def _placed(self, index: int, error: InvalidExample) -> tuple[str, str]:
        """Where an error of the table is, with its column, and what it says beside that."""
        row = self.table.where(index)
        if not error.message.startswith(row):
            return self.table.where(index, error.param), error.message
        column, _, message = error.message[len(row) :].partition(": ")
        return row + column, message

    def _found(
        self, index: int, kind: FindingKind, message: str, field: str | None = None
    ) -> Finding:
        return Finding(kind, self.table.where(index, field), message)


def odd_styles(row: Row) -> Iterator[str]:
    styles = dict.fromkeys(str(question.get("style")) for _, question in questions_of(row))
    for style in (style for style in styles if style not in KNOWN_STYLES):
        if near := difflib.get_close_matches(style, KNOWN_STYLES, n=1, cutoff=0.8):
            yield f"the style {style!r} is not known, it becomes a prefix; is {near[0]!r} meant?"


def control_tokens(value: Any, inside: str = "") -> Iterator[str]:
    """Words for each text of a row that spells a control token."""
    if isinstance(value, str):
        if token := find_control_token(value):
            yield f"{inside.strip()} spells the control token {token!r}: take it out"
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield from control_tokens(str(name), f"a name in {inside.strip() or 'the row'}")
            yield from control_tokens(inner, f"{inside}.{name}" if inside else str(name))
    elif isinstance(value, list | tuple):
        for k, inner in enumerate(value):
            if not isinstance(inner, int | float):
                yield from control_tokens(inner, f"{inside}[{k}]")


def digest_of(row: Row) -> bytes:
    """The same for rows that say the same about the same media."""
    text = json.dumps(row, sort_keys=True, default=_plain)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _plain(value: object) -> str:
    return hashlib.sha256(value).hexdigest() if isinstance(value, bytes) else str(value)


def _style_of(row: Row) -> str:
    """Of a tree those of its branches, each once."""
    return " + ".join(sorted({str(one.get("style", "")) for _, one in questions_of(row)}))


def _over(facts: RowFacts, example: Example, view: ModelView) -> Iterator[tuple[FindingKind, str]]:
    """What a run does with an example that no pack holds."""
    budgets, n_tokens = view.budgets, facts.n_tokens
    if facts.n_crops > budgets.n_crops:
        yield (
            "too long",
            f"{facts.n_crops} crops or frames, a pack holds {budgets.n_crops}: it is left out",
        )
    elif n_tokens > budgets.n_tokens:
        try:
            n_kept = int((view.tokenizing.outline(example).tree.weights > 0).sum())
        except InvalidExample:
            yield (
                "too long",
                f"{n_tokens} tokens, and no answer within the {budgets.n_tokens} of a pack: it is "
                "left out",
            )
            return
        n_lost = facts.n_answer_tokens - n_kept
        yield (
            "cut",
            f"{n_tokens} tokens, a pack holds {budgets.n_tokens}: {n_lost} of "
            f"{facts.n_answer_tokens} answer tokens are lost",
        )


def _has_unseen_tracks(row: Row, example: Example) -> bool:
    n_sightings = sum(
        len(moment.get("points", ()))
        for _, question in questions_of(row)
        for moment in question.get("tracks", ())
    )
    return n_sightings > 0 and any(
        turn.text == NO_TRACKS_TEXT for branch in example.branches for turn in branch.turns
    )
