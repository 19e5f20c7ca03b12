"""The tables that a run reads, each opened once: a user's files and registered datasets.

Knows: names in mixtures, what is not there and why. Does not know: what is in rows, what is made of
them.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from molmo_core.errors import DataError
from molmo_training.data.mixture import Group, Part
from molmo_training.data.own.table import open_tables
from molmo_training.data.rows import RowTable
from molmo_training.datasets.registry import data_folder, find_dataset
from molmo_training.train_config import DataConfig

logger = logging.getLogger(__name__)

LEARNT = "train"
"""The split of all that a mixture names."""


@dataclass(frozen=True, kw_only=True)
class _Missing:
    name: str
    why: str
    is_known: bool
    """Whether there is such a dataset with such a split, so that its files alone are missing."""


def tables_of(data: DataConfig) -> tuple[Group, dict[tuple[str, str], RowTable]]:
    """The mixture, and the tables of it and of the held-out sets by name and split.

    With `leave_out_missing` the mixture comes without what is not there. Raises DataError, which
    tells of everything that is missing.
    """
    own = {t.name: t for t in open_tables(list(data.files), allow_absolute=data.allow_absolute)}
    learnt = {(name, LEARNT) for name in names_in(data.mixture)}
    looked_at = {(held_out.dataset, held_out.split) for held_out in data.held_out}
    tables: dict[tuple[str, str], RowTable] = {}
    missing: dict[tuple[str, str], _Missing] = {}
    for name, split in sorted(learnt | looked_at):
        found = own[name] if name in own else _opened(name, split, data_folder(data.folder))
        if isinstance(found, _Missing):
            missing[name, split] = found
        else:
            tables[name, split] = found
    kept = _with_only(data.mixture, {name for name, _ in learnt - missing.keys()})
    if kept is None or not data.leave_out_missing:
        kept, needed = data.mixture, learnt | looked_at
    else:
        needed = looked_at
    if wrong := [problem for key, problem in missing.items() if key in needed]:
        raise DataError(_told(wrong))
    _warn_of(missing.values())
    return kept, tables


def _opened(name: str, split: str, root: Path) -> RowTable | _Missing:
    is_known = False
    try:
        dataset = find_dataset(name)
        is_known = split in dataset.splits
        return dataset.table(root, split)
    except DataError as error:
        return _Missing(name=name, why=error.message, is_known=is_known)


def _told(missing: Collection[_Missing]) -> str:
    """Wrong names first, for which no files can be got."""
    reasons = [problem.why.strip() for problem in sorted(missing, key=lambda m: m.is_known)]
    if len(reasons) == 1:
        return reasons[0]
    listed = " ".join(f"({number}) {why}" for number, why in enumerate(reasons, 1))
    return (
        f"{len(reasons)} datasets are missing; those of the mixture are left out with "
        f"data.leave_out_missing=true. {listed}"
    )


def _warn_of(missing: Collection[_Missing]) -> None:
    if absent := [problem.name for problem in missing if problem.is_known]:
        logger.warning("left out, for their files are not there: %s", ", ".join(absent))
    if unknown := [problem.why for problem in missing if not problem.is_known]:
        logger.warning("left out, for their names are wrong: %s", "; ".join(unknown))


def names_in(group: Group) -> Iterator[str]:
    """The datasets of a group and of those inside it."""
    for part in group.parts:
        if isinstance(part, Group):
            yield from names_in(part)
        else:
            yield part.dataset


def _with_only(group: Group, names: Collection[str]) -> Group | None:
    """The group without other datasets and without groups that are left empty."""
    parts: list[Part | Group] = []
    for part in group.parts:
        if isinstance(part, Group):
            if (kept := _with_only(part, names)) is not None:
                parts.append(kept)
        elif part.dataset in names:
            parts.append(part)
    return replace(group, parts=tuple(parts)) if parts else None
