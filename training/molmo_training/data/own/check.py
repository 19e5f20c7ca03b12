"""Whole files under examination: findings in few words, sizes by style, packs, shares.

Knows: how findings of many rows are told, statistics, the work of several processes. Does not
know: what makes a finding (`examine`), options, terminals.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from multiprocessing import get_context
from typing import Any

import numpy as np

from molmo_core.errors import DataError
from molmo_training.data.mixture import Group, Part, effective_shares, shares_table
from molmo_training.data.own.examine import DOUBTFUL, Examiner, Finding, FindingKind, RowFacts
from molmo_training.data.own.model_view import ModelView
from molmo_training.data.own.places import PointSpread
from molmo_training.data.own.table import OwnTable
from molmo_training.data.packing import Budgets

_ROWS_AT_ONCE = 256
_QUANTILES = (0.5, 0.9, 0.99, 1.0)
QUANTILE_NAMES = ("p50", "p90", "p99", "max")


@dataclass(frozen=True, kw_only=True)
class SizesOfStyle:
    """Quantiles (p50, p90, p99, max) over the usable rows of a style."""

    style: str
    n_rows: int
    tokens: tuple[int, ...]
    answer_tokens: tuple[int, ...]
    crops: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class FileReport:
    """What is known of one file; of `findings` the first of each kind, all are in `counts`."""

    name: str
    n_rows: int
    n_usable: int
    n_tokens: int
    n_crops: int
    counts: dict[FindingKind, int]
    findings: tuple[Finding, ...]
    styles: tuple[SizesOfStyle, ...]

    def n_packs(self, budgets: Budgets) -> int:
        """At the least, for one epoch."""
        fullest = max(self.n_tokens / budgets.n_tokens, self.n_crops / budgets.n_crops)
        return int(np.ceil(fullest))


@dataclass(frozen=True, kw_only=True)
class Report:
    files: tuple[FileReport, ...]
    budgets: Budgets
    mixture: Group

    @property
    def n_findings(self) -> int:
        return sum(sum(file.counts.values()) for file in self.files)

    @property
    def sizes(self) -> dict[str, int]:
        return {file.name: file.n_rows for file in self.files}

    def as_dict(self) -> dict[str, Any]:
        shares = effective_shares(self.mixture, self.sizes)
        return {
            "budgets": {"tokens": self.budgets.n_tokens, "crops": self.budgets.n_crops},
            "n_findings": self.n_findings,
            "shares": {share.dataset: share.share for share in shares},
            "files": [_as_dict(file, self.budgets) for file in self.files],
        }

    def as_text(self) -> str:
        parts = [line for file in self.files for line in _in_words(file, self.budgets)]
        if len(self.files) > 1:
            parts += ["", "effective shares", shares_table(self.mixture, self.sizes)]
        return "\n".join(parts)


def mixture_of(tables: Sequence[OwnTable], rates: Sequence[float] | None = None) -> Group:
    """The tables as a mixture: by the roots of their sizes, or by rates in their order.

    Raises DataError where there are rates, but not one for each table.
    """
    chosen = [*rates] if rates else [None] * len(tables)
    if len(chosen) != len(tables):
        raise DataError(
            f"{len(chosen)} rates for {len(tables)} files: give --rate once for each file, or not "
            "at all"
        )
    parts = [Part(dataset=t.name, rate=rate) for t, rate in zip(tables, chosen, strict=True)]
    return Group(name="own", parts=tuple(parts))


def check_tables(
    tables: Sequence[OwnTable],
    view: ModelView,
    *,
    mixture: Group,
    n_shown: int = 5,
    n_jobs: int = 1,
    opens_media: bool = False,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> Report:
    """Examine every row of the tables; `n_shown` findings of a kind are kept of each file."""
    seen: dict[bytes, str] = {}
    files = []
    for table in tables:
        examiner = Examiner(table=table, view=view, opens_media=opens_media)
        tally = _Tally(table=table, n_shown=n_shown, seen=seen)
        for facts in _facts(examiner, n_jobs):
            tally.add(facts)
            if on_progress and tally.n_rows % (16 * _ROWS_AT_ONCE) == 0:
                on_progress(table.name, tally.n_rows, len(table))
        files.append(tally.report())
    return Report(files=tuple(files), budgets=view.budgets, mixture=mixture)


@dataclass(kw_only=True)
class _Tally:
    """What was found in a file so far. `seen`: where each content stood first, in all files."""

    table: OwnTable
    n_shown: int
    seen: dict[bytes, str]
    n_rows: int = 0
    counts: Counter[FindingKind] = field(default_factory=Counter)
    shown: list[Finding] = field(default_factory=list)
    sizes: dict[str, list[tuple[int, int, int]]] = field(default_factory=lambda: defaultdict(list))
    spreads: dict[str, PointSpread] = field(default_factory=dict)

    def add(self, facts: RowFacts) -> None:
        self.n_rows += 1
        for finding in facts.findings:
            self._note(finding)
        if facts.digest:
            where = self.table.where(facts.index)
            first = self.seen.setdefault(facts.digest, where)
            if first != where:
                self._note(Finding("duplicate", where, f"says the same as {first}"))
        if facts.spread is not None:
            unit, before = facts.spread.unit, self.spreads.get(facts.spread.unit)
            self.spreads[unit] = facts.spread if before is None else before.joined(facts.spread)
        if facts.is_usable:
            size = facts.n_tokens, facts.n_answer_tokens, facts.n_crops
            self.sizes[facts.style].append(size)

    def _note(self, finding: Finding) -> None:
        self.counts[finding.kind] += 1
        if self.counts[finding.kind] <= self.n_shown:
            self.shown.append(finding)

    def report(self) -> FileReport:
        for spread in self.spreads.values():
            if doubt := spread.doubt():
                self._note(Finding("scale", self.table.name, doubt))
        everything = np.array(
            [size for sizes in self.sizes.values() for size in sizes] or [(0, 0, 0)]
        )
        return FileReport(
            name=self.table.name,
            n_rows=self.n_rows,
            n_usable=sum(map(len, self.sizes.values())),
            n_tokens=int(everything[:, 0].sum()),
            n_crops=int(everything[:, 2].sum()),
            counts=dict(self.counts),
            findings=tuple(sorted(self.shown, key=lambda found: found.is_doubtful)),
            styles=tuple(_sizes_of(style, self.sizes[style]) for style in sorted(self.sizes)),
        )


def _sizes_of(style: str, sizes: Sequence[tuple[int, int, int]]) -> SizesOfStyle:
    quantiles = np.quantile(np.array(sizes), _QUANTILES, axis=0, method="higher").astype(int)
    tokens, answer_tokens, crops = (tuple(column.tolist()) for column in quantiles.T)
    return SizesOfStyle(
        style=style, n_rows=len(sizes), tokens=tokens, answer_tokens=answer_tokens, crops=crops
    )


def _facts(examiner: Examiner, n_jobs: int) -> Iterator[RowFacts]:
    """Of every row in order, by one process or several."""
    n_rows = len(examiner.table)
    if n_jobs <= 1 or n_rows <= _ROWS_AT_ONCE:
        yield from map(examiner, range(n_rows))
        return
    parts = iter(
        [range(k, min(k + _ROWS_AT_ONCE, n_rows)) for k in range(0, n_rows, _ROWS_AT_ONCE)]
    )
    # Forked: torch and the tokenizer are there already, a fresh process needs seconds for them.
    with ProcessPoolExecutor(
        n_jobs, mp_context=get_context("fork"), initializer=_Work.begin, initargs=(examiner,)
    ) as pool:
        running = [pool.submit(_Work.do, part) for part in islice(parts, 4 * n_jobs)]
        while running:
            done = running.pop(0).result()
            running += [pool.submit(_Work.do, part) for part in islice(parts, 1)]
            yield from done


class _Work:
    """What a process of the pool works with."""

    examiner: Examiner

    @classmethod
    def begin(cls, examiner: Examiner) -> None:
        cls.examiner = examiner

    @classmethod
    def do(cls, part: Iterable[int]) -> list[RowFacts]:
        return [cls.examiner(index) for index in part]


def _as_dict(file: FileReport, budgets: Budgets) -> dict[str, Any]:
    return {
        "name": file.name,
        "n_rows": file.n_rows,
        "n_usable": file.n_usable,
        "n_packs": file.n_packs(budgets),
        "counts": file.counts,
        "findings": [
            {**found._asdict(), "is_doubtful": found.is_doubtful} for found in file.findings
        ],
        "styles": [
            {
                "style": sizes.style,
                "n_rows": sizes.n_rows,
                **{
                    name: dict(zip(QUANTILE_NAMES, getattr(sizes, name), strict=True))
                    for name in ("tokens", "answer_tokens", "crops")
                },
            }
            for sizes in file.styles
        ],
    }


def _in_words(file: FileReport, budgets: Budgets) -> Iterator[str]:
    yield (
        f"{file.name}: {file.n_rows:,} rows, {file.n_usable:,} of them usable; an epoch fills at "
        f"least {file.n_packs(budgets):,} packs of {budgets.n_tokens:,} tokens and "
        f"{budgets.n_crops:,} crops"
    )
    if file.styles:
        heads = ("tokens", "answer tokens", "crops")
        yield f"  {'style':34s} {'rows':>9s}" + "".join(f" {head:>27s}" for head in heads)
        under = "".join(f"{name:>7s}" for name in QUANTILE_NAMES)
        yield " " * 46 + under + under + under
    for sizes in file.styles:
        cells = (*sizes.tokens, *sizes.answer_tokens, *sizes.crops)
        numbers = "".join(f"{cell:7,d}" for cell in cells)
        yield f"  {sizes.style[:34]:34s} {sizes.n_rows:9,d}{numbers}"
    for kind, n_found in file.counts.items():
        shown = [found for found in file.findings if found.kind == kind]
        doubt = " (can be trained on)" if kind in DOUBTFUL else ""
        yield f"  {n_found:,} × {kind}{doubt}"
        for found in shown:
            yield f"    {found.where}: {found.message}"
        if n_found > len(shown):
            yield f"    … and {n_found - len(shown):,} more"
