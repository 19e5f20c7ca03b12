"""`molmo data list`: the datasets, their splits, and what is missing of them on this machine.

Knows: how the list is written. Does not know: datasets, the application that mounts the command.
"""

from __future__ import annotations

import json as json_format
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from molmo_core.errors import DataError
from molmo_training.datasets.registry import (
    Dataset,
    SplitStatus,
    all_datasets,
    data_folder,
    status_of,
)


def list_command(
    *groups: Annotated[str, Parameter(help="Only these groups, as drawn or image_academic")],
    root: Annotated[Path | None, Parameter(help="Folder of all data, else MOLMO_DATA_DIR")] = None,
    json: Annotated[bool, Parameter(negative=())] = False,
    count: Annotated[bool, Parameter(help="Count rows, for which tables may be read")] = True,
) -> None:
    """The datasets by name: groups, splits, licence, and what is there or missing."""
    known = sorted({group for found in all_datasets() for group in found.groups})
    if unknown := sorted(set(groups) - set(known)):
        raise DataError(f"there is no group {', '.join(unknown)}; groups are {', '.join(known)}")
    folder = data_folder(root)
    listed = [
        (found, status_of(found, folder, count=count))
        for found in all_datasets()
        if not groups or set(groups) & set(found.groups)
    ]
    if json:
        facts = {"root": str(folder), "datasets": [_facts(*one) for one in listed]}
        _say(json_format.dumps(facts, indent=2, ensure_ascii=False))
        return
    width = max(len(found.name) for found, _ in listed)
    for found, splits in listed:
        _say(f"{found.name:{width}}  {', '.join(found.groups)}; {found.licence}")
        for status in splits:
            _say(f"{'':{width}}    {_line(status)}")


def _facts(found: Dataset, splits: Sequence[SplitStatus]) -> dict[str, Any]:
    return {
        "name": found.name,
        "groups": found.groups,
        "source": found.source,
        "licence": found.licence,
        "splits": [asdict(status) for status in splits],
    }


def _line(status: SplitStatus) -> str:
    if not status.is_present:
        return f"{status.split}: missing: {status.reason}"
    rows = "present" if status.n_rows is None else f"{status.n_rows:,} rows"
    return f"{status.split}: {rows}"


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
