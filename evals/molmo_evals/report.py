"""From log entries to rows: value, 95 % interval, number of samples, target, passed or not.

Knows: metrics and layout. Does not know: requests, tasks' contents. Source: this project's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from molmo_evals.log import Entry, RunIdentity
from molmo_evals.metrics.intervals import bootstrap, wilson
from molmo_evals.task import Group, Task

_COUNTS = ("n_hits", "n_predicted", "n_true")
_METRIC_NAMES = {"f1": "F1", "accuracy": "accuracy", "mean_f1": "mean F1"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """`passed` is None without a target. `precision` and `recall` are those of f1 groups."""

    group: str
    metric: str
    what: str
    value: float
    low: float
    high: float
    n: int
    n_errors: int
    target: float | None
    passed: bool | None
    precision: float | None = None
    recall: float | None = None


def report_rows(task: Task, entries: Sequence[Entry]) -> list[Row]:
    """A row for each group that has entries, in the order of the task."""
    rows = []
    for group in task.groups:
        mine = [entry for entry in entries if entry.group == group.name]
        if mine:
            rows.append(_row(group, mine))
    return rows


def _row(group: Group, entries: Sequence[Entry]) -> Row:
    precision = recall = None
    if group.metric == "f1":
        counts = np.array([[entry.numbers[name] for name in _COUNTS] for entry in entries])
        value = float(_f1(counts.sum(axis=0)[None])[0])
        low, high = bootstrap(counts, _f1)
        n_hits, n_predicted, n_true = counts.sum(axis=0)
        precision = float(n_hits / n_predicted) if n_predicted else float(n_true == 0)
        recall = float(n_hits / n_true) if n_true else float(n_predicted == 0)
    else:
        values = np.array([entry.numbers["value"] for entry in entries])
        value = float(values.mean())
        if group.metric == "accuracy":
            low, high = wilson(int(values.sum()), len(values))
        else:
            low, high = bootstrap(values, lambda sums: sums / len(values))
    return Row(
        group=group.name,
        metric=group.metric,
        what=group.what,
        value=value,
        low=low,
        high=high,
        n=len(entries),
        n_errors=sum(entry.error is not None for entry in entries),
        target=group.target,
        passed=None if group.target is None else value >= group.target,
        precision=precision,
        recall=recall,
    )


def _f1(sums: np.ndarray) -> np.ndarray:
    """(..., 3) counts of `_COUNTS` to (...,); 1 where there was nothing to find and to be found."""
    n_both = sums[..., 1] + sums[..., 2]
    return np.where(n_both > 0, 2 * sums[..., 0] / np.maximum(n_both, 1), 1.0)


def all_passed(rows: Sequence[Row]) -> bool:
    return all(row.passed is not False for row in rows)


def as_json(identity: RunIdentity, rows: Sequence[Row]) -> dict[str, Any]:
    return {
        **asdict(identity),
        "interval": "95 %",
        "passed": all_passed(rows),
        "groups": [asdict(row) for row in rows],
    }


def print_table(identity: RunIdentity, rows: Sequence[Row], console: Console) -> None:
    """One line a group, 80 columns wide."""
    table = Table(box=SIMPLE_HEAD)
    table.add_column("what is measured", no_wrap=True)
    for name in ("value", "95 % range", "n", "errors", "target"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("passed", no_wrap=True)
    for row in rows:
        table.add_row(
            f"{row.group} {_METRIC_NAMES[row.metric]}",
            f"{row.value:.3f}",
            f"{row.low:.3f}-{row.high:.3f}",
            str(row.n),
            str(row.n_errors),
            "" if row.target is None else f"{row.target:.2f}",
            {True: "yes", False: "[bold red]NO[/]", None: ""}[row.passed],
        )
    passed = [row.passed for row in rows if row.passed is not None]
    console.print(
        f"{identity.task}, seed {identity.seed}, checkpoint {identity.checkpoint}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    console.print(table)
    console.print(f"{sum(passed)} of {len(passed)} targets reached.", highlight=False)
