"""Pages of a table, as OpenAI lists things: files and batches alike.

Knows: the columns `id` and `seq`, which ascends. Does not know: what rows mean, whose they are.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from typing import Any, Literal, TypeVar

from molmo_core.api_batches import BatchList, FileList

Order = Literal["asc", "desc"]
_List = TypeVar("_List", FileList, BatchList)


def rows_of_page(
    db: sqlite3.Connection,
    query: str,
    values: Sequence[Any],
    *,
    table: Literal["files", "batches"],
    limit: int,
    after: str | None,
    order: Order = "desc",
) -> tuple[list[tuple[Any, ...]], bool]:
    """The rows of `query` (up to its last condition) behind the one named `after`, which must be
    there, and whether there are more than `limit`."""
    if after is not None:
        sign = "<" if order == "desc" else ">"
        query += f" AND seq {sign} (SELECT seq FROM {table} WHERE id = ?)"
        values = [*values, after]
    rows = db.execute(f"{query} ORDER BY seq {order} LIMIT ?", [*values, limit + 1]).fetchall()
    return rows[:limit], len(rows) > limit


def page_of(kind: type[_List], items: list[Any], *, has_more: bool) -> _List:
    return kind(
        data=items,
        first_id=items[0].id if items else None,
        last_id=items[-1].id if items else None,
        has_more=has_more,
    )
