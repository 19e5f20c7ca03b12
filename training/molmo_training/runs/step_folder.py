"""The folders of a run's saved states: whole or not there.

A state is written into a hidden folder, and gets its name when everything of it lies on the disk.
Its last file lists the others with their sizes, so that one which was cut later, by a copy say, is
told from a whole one.

    run/step200/complete.json     step, ranks, files and their sizes
    run/step200/tensors/          weights and optimizers, as torch.distributed.checkpoint writes
    run/step200/optimizers.json   settings of the optimizers' groups
    run/step200/progress.json, data.json, random.json, training.json
    run/step200/origin.json       where the frozen weights are, unless they are among the tensors

Knows: names, sizes, order of writes. Does not know: what the files mean.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from molmo_core.errors import CheckpointError

logger = logging.getLogger(__name__)

TENSORS = "tensors"
COMPLETE = "complete.json"
_FORMAT = 1
_STEP = re.compile(r"step(\d+)")
_HIDDEN = re.compile(r"\.step\d+\.(partial|removed)")


def step_folder(run: Path, step: int) -> Path:
    return run / f"step{step}"


def partial_folder(run: Path, step: int) -> Path:
    return run / f".step{step}.partial"


def whole_steps(run: Path) -> list[int]:
    """The steps of which the run has a whole state, ascending."""
    return [step for step in _named_steps(run) if missing_of(step_folder(run, step)) is None]


def latest_step(run: Path) -> int | None:
    """The last step with a whole state; those after it that were cut are told in the log."""
    for step in reversed(_named_steps(run)):
        folder = step_folder(run, step)
        if (missing := missing_of(folder)) is None:
            return step
        logger.warning("%s is left out, it is no whole state: %s", folder.name, missing)
    return None


def step_of(folder: Path) -> int | None:
    """The step whose state `folder` is, whole or cut; None when it is something else."""
    match = _STEP.fullmatch(folder.name)
    return int(match[1]) if match and (folder / COMPLETE).exists() else None


def missing_of(folder: Path) -> str | None:
    """What a state lacks to be whole; None when it lacks nothing."""
    try:
        contents = json.loads((folder / COMPLETE).read_text())
        expected = {str(name): int(size) for name, size in contents["files"].items()}
        if contents["format"] != _FORMAT:
            return f"it has format {contents['format']}, read is {_FORMAT}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{COMPLETE} cannot be read ({error!r})"
    for name, n_bytes in expected.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != n_bytes:
            return f"{name} has {path.stat().st_size} of its {n_bytes} bytes"
    return None


def read_json(folder: Path, name: str) -> Any:
    """Raises CheckpointError."""
    try:
        return json.loads((folder / name).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{name} of {folder.name!r} cannot be read ({error})") from error


def start_partial(run: Path, step: int) -> Path:
    """An empty hidden folder for the state of `step`. Raises OSError."""
    partial = partial_folder(run, step)
    shutil.rmtree(partial, ignore_errors=True)
    (partial / TENSORS).mkdir(parents=True)
    return partial


def complete(run: Path, step: int, documents: Mapping[str, Any], **facts: Any) -> Path:
    """Give the hidden folder of `step` its documents, the list of its files, and its name.

    A broken state of that step is replaced. Raises OSError.
    """
    partial, folder = partial_folder(run, step), step_folder(run, step)
    for name, document in documents.items():
        _write_json(partial / name, document)
    files = {
        path.relative_to(partial).as_posix(): path.stat().st_size
        for path in sorted(partial.rglob("*"))
        if path.is_file()
    }
    _write_json(partial / COMPLETE, {"format": _FORMAT, "step": step, **facts, "files": files})
    _sync_folder(partial / TENSORS)
    _sync_folder(partial)
    remove_step(run, step)
    partial.rename(folder)
    _sync_folder(run)
    return folder


def remove_step(run: Path, step: int) -> None:
    """Take the name first: nobody finds a state that is half removed."""
    folder, removed = step_folder(run, step), run / f".step{step}.removed"
    if folder.exists():
        shutil.rmtree(removed, ignore_errors=True)
        folder.rename(removed)
        shutil.rmtree(removed, ignore_errors=True)


def remove_hidden(run: Path) -> None:
    """What saves that were killed left behind. Only for who writes the run."""
    for path in _children(run):
        if _HIDDEN.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


def _children(run: Path) -> Iterator[Path]:
    return run.iterdir() if run.is_dir() else iter(())


def _named_steps(run: Path) -> list[int]:
    matches = (_STEP.fullmatch(path.name) for path in _children(run) if path.is_dir())
    return sorted(int(match[1]) for match in matches if match)


def _write_json(path: Path, document: Any) -> None:
    with path.open("w") as file:
        json.dump(document, file)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
