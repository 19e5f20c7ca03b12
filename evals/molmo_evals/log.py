"""The log of a run: one JSON line for the run, then one for every sample, appended as they come.

A run that stopped goes on where it was: samples with an answer are kept, failed ones are asked
again, a last line that was cut is dropped. Knows: the file. Does not know: tasks, requests.
Source: this project's own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from molmo_core.errors import InvalidRequest


@dataclass(frozen=True, kw_only=True, slots=True)
class RunIdentity:
    """Results may only be put together when all of this is the same."""

    task: str
    seed: int
    checkpoint: str
    version: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """The outcome of one sample; `error` is None when it was answered. The sample itself, media
    and truth, follows from the seed of the run and its `key`."""

    key: str
    group: str
    verb: str
    asked: str
    numbers: Mapping[str, float]
    seconds: float
    text: str | None = None
    error: str | None = None


class RunLog:
    """`entries` holds what was answered, by key. Use it in a `with`; one writer a file."""

    def __init__(self, path: Path, identity: RunIdentity) -> None:
        """Open or begin the log at `path`; raises InvalidRequest when it is of another run."""
        self.entries: dict[str, Entry] = {}
        lines = _whole_lines(path)
        if lines:
            self._check(path, lines[0], identity)
            for entry in _entries(path, lines[1:]):
                if entry.error is None:
                    self.entries[entry.key] = entry
        path.parent.mkdir(parents=True, exist_ok=True)
        # Written again without the failed and the cut lines; a crash here loses nothing.
        started = path.with_name(f".{path.name}.part")
        kept = [asdict(identity), *(asdict(entry) for entry in self.entries.values())]
        started.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        started.replace(path)
        self._file = path.open("a", encoding="utf-8")

    def append(self, entry: Entry) -> None:
        self._file.write(json.dumps(asdict(entry)) + "\n")
        self._file.flush()
        if entry.error is None:
            self.entries[entry.key] = entry

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    @staticmethod
    def _check(path: Path, first: dict[str, Any], identity: RunIdentity) -> None:
        if first != asdict(identity):
            raise InvalidRequest(
                f"{path} is the log of {first}, this run is {asdict(identity)}; "
                "name another folder with --folder, or delete it"
            )


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    whole, _, _ = text.rpartition("\n")
    try:
        return [json.loads(line) for line in whole.splitlines()]
    except ValueError as failure:
        raise InvalidRequest(
            f"{path} is no log of a run ({failure}); name another folder with --folder"
        ) from failure


def _entries(path: Path, lines: Sequence[dict[str, Any]]) -> list[Entry]:
    try:
        return [Entry(**line) for line in lines]
    except TypeError as failure:
        raise InvalidRequest(
            f"{path} was written by another version ({failure}); name another folder with --folder"
        ) from failure
