"""What messages say of errors and of many names: a line of the one, the first of the others.

Knows: text. Does not know: what it is about.
"""

from __future__ import annotations

from collections.abc import Sequence


def first_line(error: BaseException) -> str:
    """Of its message; its type where it has none."""
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__


def first_of(items: Sequence[str], n_shown: int = 5) -> str:
    """The first items and how many more there are."""
    more = f" and {len(items) - n_shown} more" if len(items) > n_shown else ""
    return "; ".join(items[:n_shown]) + more
