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

import os
import shutil
import time
import uuid
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from molmo_core.checkpoints.leases import held_by, new_lease
from molmo_core.checkpoints.manifest import (
    CURRENT,
    MANIFEST,
    NAME,
    STALE_S,
    Manifest,
    describe_files,
    new_id,
    not_stored,
    pointed_at,
    read_manifest,
    to_retire,
    verified,
)
from molmo_core.errors import CheckpointError

_CHECKPOINTS, _STAGING, _LIVE = "checkpoints", "staging", "live"


class FolderStore:
    """The store in a folder of this machine, or one that is mounted."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    # --- reading --------------------------------------------------------------------------------

    def current(self) -> str | None:
        """The id to serve, None when nothing was published. Raises CheckpointError."""
        try:
            return pointed_at((self.folder / CURRENT).read_bytes())
        except FileNotFoundError:
            return None
        except OSError as error:
            raise CheckpointError(f"{CURRENT} cannot be read ({error})") from error

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
        if not self.has(checkpoint_id) or folder.is_symlink():
            raise not_stored(checkpoint_id, self.ids())
        return folder

    def has(self, checkpoint_id: str) -> bool:
        """Whether there is one of that id, in order or damaged."""
        folder = self.folder / _CHECKPOINTS / checkpoint_id
        return bool(NAME.fullmatch(checkpoint_id)) and folder.is_dir()

    def manifest(self, checkpoint_id: str) -> Manifest:
        """Raises CheckpointError when there is none of that id."""
        return read_manifest(self.folder_of(checkpoint_id))

    def bring(self, checkpoint_id: str) -> Path:
        """Its folder, when every file is as the manifest says. Raises CheckpointError."""
        folder = self.folder_of(checkpoint_id)
        verified(folder, checkpoint_id)
        return folder

    def verify(self, checkpoint_id: str) -> Manifest:
        """Read every file and compare with the manifest. Raises CheckpointError, saying what."""
        return verified(self.folder_of(checkpoint_id), checkpoint_id)

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
        files = describe_files(staged)
        manifest = Manifest(id=new_id(name, files), name=name, files=files, **facts)
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
        partial = self.folder / f".{CURRENT}.{uuid.uuid4().hex}"
        try:
            write_durably(partial, f"{checkpoint_id}\n".encode())
            os.replace(partial, self.folder / CURRENT)
        finally:
            partial.unlink(missing_ok=True)
        _sync(self.folder)

    def retire(self, keep: int) -> list[str]:
        """Remove all but the last `keep`; never the current one, nor one that somebody serves.

        Returns the ids that were removed. Raises ValueError for fewer than one.
        """
        removed = []
        for checkpoint_id in to_retire(self.ids(), keep):
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
        try:
            partial.write_bytes(new_lease(checkpoint_ids))
            os.replace(partial, folder / f"{holder}.json")
        finally:
            partial.unlink(missing_ok=True)

    def release(self, holder: str) -> None:
        (self.folder / _LIVE / f"{holder}.json").unlink(missing_ok=True)

    def live(self) -> set[str]:
        """The ids under leases that have not ended. Raises CheckpointError for a damaged lease."""
        held: set[str] = set()
        for path in (self.folder / _LIVE).glob("*.json"):
            with suppress(FileNotFoundError):  # released meanwhile
                held |= held_by(path.read_bytes(), path.name)
        return held

    def _sweep(self) -> None:
        """Remove what dead publishers left."""
        root = self.folder / _STAGING
        for path in root.iterdir() if root.is_dir() else ():
            with suppress(FileNotFoundError):  # another publisher has just ended
                if time.time() - path.stat().st_mtime > STALE_S:
                    shutil.rmtree(path, ignore_errors=True)


def write_durably(path: Path, content: bytes) -> None:
    """The bytes are on the disk when this returns; the folder's entry is not yet."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
