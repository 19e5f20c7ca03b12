"""Examples and packs of files as a page: drawn as a run draws them, or in the order of a file.

Knows: mixtures, lanes, which row an example came from. Does not know: pages' form, options.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice

import numpy as np

from molmo_core.errors import DataError, MolmoError
from molmo_training.data.example import Example, Tokenized
from molmo_training.data.lanes import Lane, LaneState, Plan, SizedRow, StreamConfig
from molmo_training.data.mixture import Draw, DrawSequence, Group, Share, effective_shares
from molmo_training.data.own.model_view import ModelView
from molmo_training.data.own.page.page import Card, PackCard, Page, Showing, source_text
from molmo_training.data.own.page.tokens import Speller
from molmo_training.data.own.schema import questions_of
from molmo_training.data.own.table import OwnTable
from molmo_training.data.packing import Size
from molmo_training.data.rows import FormattedRows, PendingRow


@dataclass(frozen=True, kw_only=True)
class Viewer:
    """Pages of some tables as a model sees them."""

    tables: Mapping[str, OwnTable]
    view: ModelView
    mixture: Group
    seed: int = 0

    def examples(self, n: int, *, start: int = 0, in_order: bool = False) -> Page:
        """`n` examples from number `start` on: of the run, or of the tables one after another.

        Raises DataError when there is none.
        """
        sequence, showing = DrawSequence(self._shares(), self._sizes(), self.seed), self._showing()
        draws = [sequence(number) for number in range(start, start + n)]
        if in_order:
            rows = (Draw(name, k, 0) for name, t in self.tables.items() for k in range(len(t)))
            draws = list(islice(rows, start, start + n))
        if not draws:
            n_rows = sum(self._sizes().values())
            raise DataError(f"there is no row {start}, the files have {n_rows}: begin earlier")
        cards = []
        for number, draw in enumerate(draws):
            anchor = f"e{number + 1}"
            try:
                rows_of = self.view.rows(self.tables[draw.dataset])
                example = rows_of.example(draw.index, sequence.generator(draw))
                row = self.view.tokenizing(example)
                cards.append(self._card(showing, draw.dataset, draw.index, example, row, anchor))
            except MolmoError as error:
                cards.append(self._left_out(draw, error, anchor))
        return self._page(f"{len(cards)} examples", cards=tuple(cards))

    def packs(self, n: int) -> Page:
        """The first `n` packs of a run with one lane. Raises DataError when none can be made."""
        made: dict[int, _Made] = {}
        sources = {
            name: _Noting(name, self.view.rows(table), made) for name, table in self.tables.items()
        }
        config = StreamConfig(
            mixture=self.mixture,
            budgets=self.view.budgets,
            n_lanes=1,
            seed=self.seed,
            n_bad_allowed=sum(self._sizes().values()),
        )
        lane, showing = Lane(Plan(config, sources), 0, LaneState()), self._showing()
        packs: list[PackCard] = []
        for number in range(n):
            rows = lane.next_pack()
            cards = []
            for k, row in enumerate(rows):
                # The lane changes weights only: an example is known by its array of ids.
                name, index, example, _ = made[id(row.input_ids)]
                anchor = f"p{number + 1}e{k + 1}"
                cards.append(self._card(showing, name, index, example, row, anchor, has_mask=False))
            packs.append(showing.pack(cards, rows, lane.bad))
            lane.bad.clear()
            made.clear()
        return self._page(f"{len(packs)} packs", packs=tuple(packs))

    def _card(
        self,
        showing: Showing,
        name: str,
        index: int,
        example: Example,
        row: Tokenized,
        anchor: str,
        *,
        has_mask: bool = True,
    ) -> Card:
        table = self.tables[name]
        styles = (str(question["style"]) for _, question in questions_of(table.row(index)))
        return showing.card(
            where=table.where(index),
            source=table.records.record(index),
            anchor=anchor,
            styles=tuple(dict.fromkeys(styles)),
            example=example,
            row=row,
            has_mask=has_mask,
        )

    def _left_out(self, draw: Draw, error: MolmoError, anchor: str) -> Card:
        table = self.tables[draw.dataset]
        try:
            source = source_text(table.records.record(draw.index))
        except MolmoError:
            source = "it cannot be read"
        where = table.where(draw.index)
        return Card(anchor=anchor, where=where, source=source, fault=error.message)

    def _page(
        self, title: str, *, cards: tuple[Card, ...] = (), packs: tuple[PackCard, ...] = ()
    ) -> Page:
        sizes = self._sizes()
        shares = tuple((s.dataset, sizes[s.dataset], s.share) for s in self._shares())
        return Page(
            title=f"{title} of {', '.join(self.tables)}",
            model=self.view.name,
            shares=shares,
            n_tokens=self.view.budgets.n_tokens,
            n_crops=self.view.budgets.n_crops,
            cards=cards,
            packs=packs,
        )

    def _showing(self) -> Showing:
        return Showing(view=self.view, speller=Speller(self.view.tokenizer))

    def _sizes(self) -> dict[str, int]:
        return {name: len(table) for name, table in self.tables.items()}

    def _shares(self) -> tuple[Share, ...]:
        return effective_shares(self.mixture, self._sizes())


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
        example, tokenizing = self.rows.example(index, rng), self.rows.tokenizing
        outline = tokenizing.outline(example)
        pending = PendingRow(example=example, outline=outline, tokenizing=tokenizing)
        return _Noted(pending, lambda row, example: self._note(index, row, example))

    def _note(self, index: int, row: Tokenized, example: Example) -> None:
        self.made[id(row.input_ids)] = (self.name, index, example, row)


@dataclass(frozen=True)
class _Noted:
    pending: PendingRow
    note: Callable[[Tokenized, Example], None]

    @property
    def size(self) -> Size:
        return self.pending.size

    def row(self) -> Tokenized:
        row = self.pending.row()
        self.note(row, self.pending.example)
        return row
