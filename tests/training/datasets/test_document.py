"""docs/datasets.md names every dataset as the registry has it.

The table is written anew by: python -m tests.training.datasets.test_document
"""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

from molmo_training.datasets import all_datasets
from molmo_training.datasets.registry import Dataset

PAGE = Path(__file__).parents[3] / "docs" / "datasets.md"
BEGIN, END = "<!-- table: begin -->\n", "<!-- table: end -->\n"


def table() -> str:
    """A line for the datasets that share all but their names."""

    def shared(found: Dataset) -> tuple[str, ...]:
        groups = ", ".join(found.groups)
        return groups, found.source, ", ".join(found.splits), found.licence

    lines = ["| names | groups | source | splits | licence |", "|---|---|---|---|---|"]
    for facts, datasets in groupby(sorted(all_datasets(), key=shared), key=shared):
        names = ", ".join(f"`{found.name}`" for found in datasets)
        lines.append(" | ".join((f"| {names}", *facts)) + " |")
    return "\n".join(lines) + "\n"


def test_the_table_is_that_of_the_registry() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert text.partition(BEGIN)[2].partition(END)[0] == table()


if __name__ == "__main__":
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}{table()}{END}{rest.partition(END)[2]}", encoding="utf-8")
