"""Examples and packs as a page: drawn as a run draws them, or in the order of their files.

Knows: mixtures, lanes, which row an example came from. Does not know: pages' form, options.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np

from molmo_core.errors import DataError, MolmoError
from molmo_training.data.example import Example, Tokenized
from molmo_training.data.lanes import Lane, LaneState, Plan, SizedRow, StreamConfig
from molmo_training.data.mixture import Draw, DrawSequence
from molmo_training.data.own.model_view import ModelView
from molmo_training.data.own.page.page import Card, PackCard, Page, Showing, source_text
from molmo_training.data.own.page.tokens import Speller, counted
from molmo_training.data.own.schema import questions_of
from molmo_training.data.own.table import OwnTable
from molmo_training.data.packing import Size
from molmo_training.data.rows import FormattedRows, PendingRow


@dataclass(frozen=True, kw_only=True)
class Viewer:
    """Pages of a run's examples, as its model sees them."""

    sources: Mapping[str, FormattedRows]
    view: ModelView
    stream: StreamConfig
    """Of the run: what is drawn when, and packed with what."""

    def examples(self, n: int, *, start: int = 0, in_order: bool = False) -> Page:
        """`n` examples from number `start` on: of the run, or of the tables one after another.

        Raises DataError when there is none.
        """
        if in_order:
            rows = (Draw(name, k, 0) for name, t in self.sources.items() for k in range(len(t)))
            draws = list(islice(rows, start, start + n))
        else:
            draws = [self._draws(number) for number in range(start, start + n)]
        if not draws:
            raise DataError(
                f"there is no row {start}, the files have {self._n_rows}: begin earlier"
            )
        cards = []
        for number, draw in enumerate(draws):
            anchor = f"e{number + 1}"
            try:
                rng = self._draws.generator(draw)
                example = self.sources[draw.dataset].example(draw.index, rng)
                row = self.view.tokenizing(example)
                cards.append(self._card(draw.dataset, draw.index, example, row, anchor))
            except MolmoError as error:
                cards.append(self._left_out(draw, error, anchor))
        return self._page(counted(len(cards), "example"), cards=tuple(cards))

    def packs(self, n: int) -> Page:
        """The first `n` packs of the run, a lane after the other.

        Raises DataError when none can be made.
        """
        made: dict[int, _Made] = {}
        sources = {name: _Noting(name, rows, made) for name, rows in self.sources.items()}
        plan = Plan(replace(self.stream, n_bad_allowed=self._n_rows), sources)
        lanes = [Lane(plan, k, LaneState()) for k in range(min(n, self.stream.n_lanes))]
        packs: list[PackCard] = []
        for number in range(n):
            lane = lanes[number % len(lanes)]
            rows = lane.next_pack()
            cards = []
            for k, row in enumerate(rows):
                # The lane changes weights only: an example is known by its array of ids.
                name, index, example, _ = made[id(row.input_ids)]
                anchor = f"p{number + 1}e{k + 1}"
                cards.append(self._card(name, index, example, row, anchor, has_mask=False))
            packs.append(self._showing.pack(cards, rows, lane.bad))
            lane.bad.clear()
            made.clear()
        return self._page(counted(len(packs), "pack"), packs=tuple(packs))

    def _card(
        self,
        name: str,
        index: int,
        example: Example,
        row: Tokenized,
        anchor: str,
        *,
        has_mask: bool = True,
    ) -> Card:
        questions = questions_of(self.sources[name].table.row(index))
        styles = [question.get("style") for _, question in questions]
        return self._showing.card(
            where=self._where(name, index),
            source=self._record(name, index),
            anchor=anchor,
            styles=tuple(dict.fromkeys(str(style) for style in styles if style)),
            example=example,
            row=row,
            has_mask=has_mask,
        )

    def _left_out(self, draw: Draw, error: MolmoError, anchor: str) -> Card:
        try:
            source = source_text(self._record(draw.dataset, draw.index))
        except MolmoError:
            source = "it cannot be read"
        where = self._where(draw.dataset, draw.index)
        return Card(anchor=anchor, where=where, source=source, fault=error.message)

    def _where(self, name: str, index: int) -> str:
        table = self.sources[name].table
        return table.where(index) if isinstance(table, OwnTable) else f"{name}[{index}]"

    def _record(self, name: str, index: int) -> Any:
        """What the file says; of other tables the row that they make of it."""
        table = self.sources[name].table
        return table.records.record(index) if isinstance(table, OwnTable) else table.row(index)

    def _page(
        self, title: str, *, cards: tuple[Card, ...] = (), packs: tuple[PackCard, ...] = ()
    ) -> Page:
        names = list(self.sources)
        more = f" and {len(names) - 3} more" if len(names) > 4 else ""
        shares = self._draws.shares
        return Page(
            title=f"{title} of {', '.join(names[:3] if more else names)}{more}",
            model=self.view.name,
            shares=tuple((s.dataset, len(self.sources[s.dataset]), s.share) for s in shares),
            n_tokens=self.view.budgets.n_tokens,
            n_crops=self.view.budgets.n_crops,
            cards=cards,
            packs=packs,
        )

    @cached_property
    def _showing(self) -> Showing:
        return Showing(view=self.view, speller=Speller(self.view.tokenizer))

    @cached_property
    def _draws(self) -> DrawSequence:
        return Plan(self.stream, self.sources).draws

    @property
    def _n_rows(self) -> int:
        return sum(map(len, self.sources.values()))


_Made = tuple[str, int, Example, Tokenized]
"""Where an example came from, and its arrays, so that they live as long as they are looked up."""


@dataclass(frozen=True)
class _Noting:
    """A source that notes which examples were made into rows, by the address of their ids."""

    name: str
    rows: FormattedRows
    made: dict[int, _Made]

    def __len__(self) -> int:
        return len(self.rows)

    def make(self, index: int, rng: np.random.Generator) -> SizedRow:
        return _Noted(self, index, self.rows.make(index, rng))


@dataclass(frozen=True)
class _Noted:
    source: _Noting
    index: int
    pending: PendingRow

    @property
    def size(self) -> Size:
        return self.pending.size

    def row(self) -> Tokenized:
        row = self.pending.row()
        made = self.source.name, self.index, self.pending.example, row
        self.source.made[id(row.input_ids)] = made
        return row
