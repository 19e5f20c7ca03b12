"""A store of published checkpoints: complete folders that never change, and which one is current.

    STORE/staging/<uuid>/        being written; nobody reads it
    STORE/checkpoints/<id>/      complete: manifest.json names every file with size and SHA-256
    STORE/CURRENT                the id to serve, replaced as a whole
    STORE/live/<holder>.json     who serves which checkpoint, so that retention leaves it alone

A folder gets its name only when everything in it is on the disk, and the name tells its content:
`<name>-<12 hex digits>`. A reader believes only what the manifest's hashes confirm. Whatever kills
a publisher leaves at most a folder under staging/, which is removed when it is a day old.

Knows: files, hashes, the order of writes. Does not know: models, engines, who asks for what.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from molmo_core.errors import CheckpointError

MANIFEST = "manifest.json"
_CURRENT, _CHECKPOINTS, _STAGING, _LIVE = "CURRENT", "checkpoints", "staging", "live"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,80}")
_HASH_BYTES = 1 << 22
_STALE_S = 24 * 3600.0
_LEASE_S = 600.0


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FileEntry(_Record):
    name: str
    n_bytes: int = Field(ge=0)
    sha256: str


class Probe(_Record):
    """A question and what the published weights answer to it, computed in float32."""

    question: str
    image_png: str | None = None
    """Base64."""
    answer_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    """Of each token of the greedy answer, in nats."""

    @model_validator(mode="after")
    def _check_lengths(self) -> Probe:
        if len(self.answer_ids) != len(self.logprobs):
            raise ValueError(
                f"{len(self.answer_ids)} answer_ids and {len(self.logprobs)} logprobs; there must "
                "be one for each"
            )
        return self


class Manifest(_Record):
    id: str
    name: str
    source: str
    """What was published: a run and its step."""
    step: int | None = None
    code_version: str
    created: float
    """Seconds since 1970."""
    bidirectional: str
    """The visual mask that the weights were trained with."""
    files: tuple[FileEntry, ...]
    probes: tuple[Probe, ...] = ()


class CheckpointStore:
    """The store in a folder of this machine, or one that is mounted."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    # --- reading --------------------------------------------------------------------------------

    def current(self) -> str | None:
        """The id to serve, None when nothing was published. Raises CheckpointError."""
        try:
            name = (self.folder / _CURRENT).read_text().strip()
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{_CURRENT} cannot be read ({error})") from error
        if not _NAME.fullmatch(name):
            raise CheckpointError(f"{_CURRENT} says {name[:100]!r}, which is no id")
        return name

    def ids(self) -> list[str]:
        """Every complete checkpoint, the oldest first."""
        root = self.folder / _CHECKPOINTS
        found = [p for p in root.iterdir() if p.is_dir()] if root.is_dir() else []
        times: list[tuple[float, str]] = []
        for path in found:
            with suppress(FileNotFoundError):  # retired meanwhile
                times.append((path.stat().st_mtime, path.name))
        return [name for _, name in sorted(times)]

    def folder_of(self, checkpoint_id: str) -> Path:
        """Raises CheckpointError when there is none of that id."""
        folder = self.folder / _CHECKPOINTS / checkpoint_id
        if not _NAME.fullmatch(checkpoint_id) or not folder.is_dir():
            known = ", ".join(self.ids()[-5:]) or "none"
            raise CheckpointError(
                f"the store has no checkpoint {checkpoint_id[:100]!r}; the last ones are: {known}"
            )
        return folder

    def verify(self, checkpoint_id: str) -> Manifest:
        """Read every file and compare with the manifest. Raises CheckpointError, saying what."""
        folder = self.folder_of(checkpoint_id)
        manifest = read_manifest(folder)
        if manifest.id != checkpoint_id:
            raise CheckpointError(f"the manifest of {checkpoint_id} is that of {manifest.id}")
        check_files(folder, manifest)
        return manifest

    # --- writing --------------------------------------------------------------------------------

    @contextmanager
    def staging(self) -> Iterator[Path]:
        """A new folder to write into; it is removed at the end unless it was published."""
        self._sweep()
        folder = self.folder / _STAGING / uuid.uuid4().hex
        folder.mkdir(parents=True)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def publish(self, staged: Path, *, name: str, **facts: Any) -> Manifest:
        """Make the staged folder a checkpoint and the current one.

        `facts` are the other fields of the manifest. The same content is published once: the id
        is then that of the first time. Raises CheckpointError for a name that is none.
        """
        if not _NAME.fullmatch(name):
            raise CheckpointError(
                f"the name is {name[:100]!r}; allowed are letters, digits, '.', '_' and '-'"
            )
        files = describe_files(staged)
        digest = hashlib.sha256(json.dumps([f.model_dump() for f in files]).encode()).hexdigest()
        manifest = Manifest(id=f"{name}-{digest[:12]}", name=name, files=files, **facts)
        write_durably(staged / MANIFEST, manifest.model_dump_json(indent=2).encode() + b"\n")
        for entry in files:
            _sync(staged / entry.name)
        for folder in [staged, *(p for p in staged.rglob("*") if p.is_dir())]:
            _sync(folder)
        target = self.folder / _CHECKPOINTS / manifest.id
        target.parent.mkdir(parents=True, exist_ok=True)
        _sync(self.folder)
        try:
            os.rename(staged, target)
        except OSError:
            if not target.is_dir():
                raise
            manifest = self.verify(manifest.id)  # the same content stands there already
        _sync(target.parent)
        self.set_current(manifest.id)
        return manifest

    def set_current(self, checkpoint_id: str) -> None:
        """Point at a complete checkpoint. Raises CheckpointError when it is not in order."""
        self.verify(checkpoint_id)
        partial = self.folder / f".{_CURRENT}.{uuid.uuid4().hex}"
        try:
            write_durably(partial, f"{checkpoint_id}\n".encode())
            os.replace(partial, self.folder / _CURRENT)
        finally:
            partial.unlink(missing_ok=True)
        _sync(self.folder)

    def retire(self, keep: int) -> list[str]:
        """Remove all but the last `keep`; never the current one, nor one that somebody serves.

        Returns the ids that were removed. Raises ValueError for fewer than one.
        """
        if keep < 1:
            raise ValueError(f"keep is {keep}; at least one checkpoint stays")
        ids = self.ids()
        removed = []
        for checkpoint_id in ids[:-keep]:
            if checkpoint_id in {self.current(), *self.live()}:  # asked anew: removing takes time
                continue
            # First out of sight, so that nobody opens what is going.
            doomed = self.folder / _STAGING / uuid.uuid4().hex
            doomed.parent.mkdir(exist_ok=True)
            with suppress(FileNotFoundError):  # another publisher retires as well
                os.rename(self.folder / _CHECKPOINTS / checkpoint_id, doomed)
                shutil.rmtree(doomed)
                removed.append(checkpoint_id)
        return removed

    # --- who serves what ------------------------------------------------------------------------

    def hold(self, holder: str, checkpoint_ids: Collection[str]) -> None:
        """Say that `holder` serves these for the next ten minutes; repeat it while it does."""
        folder = self.folder / _LIVE
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f".{holder}.{uuid.uuid4().hex}"
        lease = {"ids": sorted(checkpoint_ids), "until": time.time() + _LEASE_S}
        try:
            partial.write_text(json.dumps(lease))
            os.replace(partial, folder / f"{holder}.json")
        finally:
            partial.unlink(missing_ok=True)

    def release(self, holder: str) -> None:
        (self.folder / _LIVE / f"{holder}.json").unlink(missing_ok=True)

    def live(self) -> set[str]:
        """The ids under leases that have not ended. Raises CheckpointError for a damaged lease."""
        held: set[str] = set()
        for path in (self.folder / _LIVE).glob("*.json"):
            try:
                lease = json.loads(path.read_text())
                if lease["until"] > time.time():
                    held |= set(lease["ids"])
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise CheckpointError(
                    f"the lease {path.name} cannot be read ({error!r}); remove it when nothing of "
                    "that name is running"
                ) from error
        return held

    def _sweep(self) -> None:
        """Remove what dead publishers left."""
        root = self.folder / _STAGING
        for path in root.iterdir() if root.is_dir() else ():
            with suppress(FileNotFoundError):  # another publisher has just ended
                if time.time() - path.stat().st_mtime > _STALE_S:
                    shutil.rmtree(path, ignore_errors=True)


def read_manifest(folder: Path) -> Manifest:
    """Raises CheckpointError when it is missing or is none."""
    try:
        return Manifest.model_validate_json((folder / MANIFEST).read_bytes())
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{folder.name} has no {MANIFEST}: it was not published, or not to its end"
        ) from error
    except (OSError, ValidationError) as error:
        raise CheckpointError(f"{MANIFEST} of {folder.name} cannot be read ({error})") from error


def check_files(folder: Path, manifest: Manifest) -> None:
    """Raises CheckpointError unless the folder holds just the manifest's files, unaltered."""
    found = {path.relative_to(folder).as_posix() for path in _files(folder)} - {MANIFEST}
    named = {entry.name for entry in manifest.files}
    if found != named:
        missing, foreign = sorted(named - found), sorted(found - named)
        raise CheckpointError(
            f"{folder.name} lacks {missing or 'nothing'} and holds {foreign or 'nothing'} that "
            "its manifest does not name"
        )
    for entry in manifest.files:
        path = folder / entry.name
        n_bytes = path.stat().st_size
        if n_bytes != entry.n_bytes:
            raise CheckpointError(
                f"{entry.name} of {folder.name} has {n_bytes} bytes, its manifest says "
                f"{entry.n_bytes}: it is cut short or was changed"
            )
        if _sha256(path) != entry.sha256:
            raise CheckpointError(
                f"{entry.name} of {folder.name} is not what was published: its SHA-256 differs"
            )


def describe_files(folder: Path) -> tuple[FileEntry, ...]:
    return tuple(
        FileEntry(
            name=path.relative_to(folder).as_posix(),
            n_bytes=path.stat().st_size,
            sha256=_sha256(path),
        )
        for path in sorted(_files(folder))
        if path.name != MANIFEST
    )


def write_durably(path: Path, content: bytes) -> None:
    """The bytes are on the disk when this returns; the folder's entry is not yet."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _files(folder: Path) -> list[Path]:
    """All files below; a link could lead anywhere, and be changed later."""
    paths = [path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()]
    if odd := [path.name for path in paths if path.is_symlink() or not path.is_file()]:
        raise CheckpointError(f"{folder.name} holds {odd[:3]}, which are no plain files")
    return paths


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_HASH_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
