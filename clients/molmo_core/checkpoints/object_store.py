"""A store of published checkpoints in an object store, through fsspec.

    URL/checkpoints/<id>/…              the files, and last of all manifest.json
    URL/checkpoints/<id>/.uploading     since when somebody uploads it, in seconds since 1970
    URL/CURRENT                         the id to serve
    URL/live/<holder>.json              who serves which checkpoint

Nothing can be renamed there, but one object appears as a whole: a checkpoint exists when its
manifest does. It is downloaded into a folder of this machine, and believed when every hash is
right. Uploads that were broken off are removed a day later, with the next retirement.

Knows: the order of uploads. Does not know: models, engines, who asks for what.
"""

from __future__ import annotations

import functools
import logging
import os
import shutil
import time
import uuid
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any, ParamSpec, TypeVar

from molmo_core.checkpoints.leases import held_by, new_lease
from molmo_core.checkpoints.manifest import (
    CURRENT,
    MANIFEST,
    NAME,
    STALE_S,
    Manifest,
    check_files,
    check_id,
    describe_files,
    new_id,
    not_stored,
    parse_manifest,
    pointed_at,
    read_manifest,
    to_retire,
)
from molmo_core.errors import CheckpointError, MolmoError

_CHECKPOINTS, _LIVE, _UPLOADING = "checkpoints", "live", ".uploading"
P = ParamSpec("P")
R = TypeVar("R")

logger = logging.getLogger(__name__)


def _reaching(method: Callable[P, R]) -> Callable[P, R]:
    """What a library of a place raises that it does not derive from OSError, as OSError."""

    @functools.wraps(method)
    def reached(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return method(*args, **kwargs)
        except (OSError, MolmoError, ValueError):
            raise
        except Exception as error:  # each place has its own: the edge to foreign code
            raise OSError(f"the store cannot be reached ({error!r})") from error

    return reached


class ObjectStore:
    def __init__(self, url: str, *, cache: Path) -> None:
        try:
            from fsspec.core import url_to_fs  # only who uses an object store needs it

            self._files, root = url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise CheckpointError(
                f"the store {url.partition('://')[0]}:// cannot be opened ({error}); install "
                "fsspec's package for it, as s3fs for s3://, gcsfs for gs://, adlfs for az://"
            ) from error
        self.url, self._root, self._cache = url, root.rstrip("/"), cache

    # --- reading --------------------------------------------------------------------------------

    @_reaching
    def current(self) -> str | None:
        """The id to serve, None when nothing was published.

        Raises CheckpointError, and OSError when the store cannot be reached.
        """
        try:
            return pointed_at(self._read(CURRENT))
        except FileNotFoundError:
            return None

    @_reaching
    def ids(self) -> list[str]:
        """Every complete checkpoint, the oldest first."""
        found = []
        for name in self._names(_CHECKPOINTS):
            try:
                found.append((self._manifest(name).created, name))
            except FileNotFoundError:  # not complete, or retired meanwhile
                continue
            except CheckpointError as error:  # one that is damaged hides no others
                logger.warning("%s is left out: %s", name, error.message)
        return [name for _, name in sorted(found)]

    def has(self, checkpoint_id: str) -> bool:
        """Whether there is one of that id, complete or damaged."""
        path = self._path(_CHECKPOINTS, checkpoint_id, MANIFEST)
        return bool(NAME.fullmatch(checkpoint_id)) and self._exists(path)

    @_reaching
    def _exists(self, path: str) -> bool:
        self._files.invalidate_cache()
        return bool(self._files.exists(path))

    @_reaching
    def manifest(self, checkpoint_id: str) -> Manifest:
        """Raises CheckpointError when there is none of that id."""
        try:
            if NAME.fullmatch(checkpoint_id):
                return self._manifest(checkpoint_id)
        except FileNotFoundError:
            pass
        raise not_stored(checkpoint_id, self.ids())

    @_reaching
    def bring(self, checkpoint_id: str) -> Path:
        """Download it, unless it is here, and compare every file with the manifest.

        Returns a folder that is not to be written to. Raises CheckpointError, saying what is
        wrong, and OSError when the store cannot be reached.
        """
        manifest = self.manifest(checkpoint_id)
        target = self._cache / checkpoint_id
        if target.is_dir():
            try:
                check_files(target, manifest)
                return target
            except CheckpointError:  # altered here: what the store holds may be in order
                shutil.rmtree(target)
        partial = self._cache / f".{checkpoint_id}.{uuid.uuid4().hex}"
        try:
            for entry in manifest.files:
                local = partial / _inside(entry.name, checkpoint_id)
                local.parent.mkdir(parents=True, exist_ok=True)
                remote = self._path(_CHECKPOINTS, checkpoint_id, entry.name)
                try:
                    self._files.get_file(remote, str(local))
                except FileNotFoundError as error:
                    raise CheckpointError(f"{checkpoint_id} lacks {entry.name}") from error
            check_files(partial, manifest)
            (partial / MANIFEST).write_text(manifest.model_dump_json(indent=2))
            try:
                os.rename(partial, target)
            except OSError:
                if not target.is_dir():
                    raise
                check_files(target, manifest)  # another process of this machine was quicker
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return target

    def verify(self, checkpoint_id: str) -> Manifest:
        """Read every file and compare with the manifest. Raises CheckpointError, saying what."""
        return read_manifest(self.bring(checkpoint_id))

    # --- writing --------------------------------------------------------------------------------

    @contextmanager
    def staging(self) -> Iterator[Path]:
        """A new folder of this machine to write into; it is removed at the end."""
        folder = self._cache / f".staging-{uuid.uuid4().hex}"
        folder.mkdir(parents=True)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    @_reaching
    def publish(self, staged: Path, *, name: str, **facts: Any) -> Manifest:
        """Upload the staged folder, the manifest last, and make it the current one.

        `facts` are the other fields of the manifest. The same content is published once. Raises
        CheckpointError for a name that is none, and when the store holds other sizes than it got.
        """
        files = describe_files(staged)
        manifest = Manifest(id=new_id(name, files), name=name, files=files, **facts)
        base = (_CHECKPOINTS, manifest.id)
        try:
            manifest = self._manifest(manifest.id)
        except FileNotFoundError:
            self._write(f"{time.time()}".encode(), *base, _UPLOADING)
            for entry in files:
                path = self._path(*base, entry.name)
                self._make_folder(path)
                self._files.put_file(str(staged / entry.name), path)
            self._check_sizes(manifest)
            self._write(manifest.model_dump_json(indent=2).encode(), *base, MANIFEST)
            with suppress(FileNotFoundError):  # another publisher of the same was quicker
                self._files.rm_file(self._path(*base, _UPLOADING))
        self.set_current(manifest.id)
        return manifest

    @_reaching
    def set_current(self, checkpoint_id: str) -> None:
        """Point at a complete checkpoint. Raises CheckpointError when it is not."""
        self._check_sizes(self.manifest(checkpoint_id))
        self._write(f"{checkpoint_id}\n".encode(), CURRENT)

    @_reaching
    def retire(self, keep: int) -> list[str]:
        """Remove all but the last `keep`; never the current one, nor one that somebody serves.

        Returns the ids that were removed. Raises ValueError for fewer than one.
        """
        removed = []
        for checkpoint_id in to_retire(self.ids(), keep):
            if checkpoint_id in {self.current(), *self.live()}:  # asked anew: removing takes time
                continue
            # First the manifest, so that nobody begins to read what is going; the mark has the
            # rest removed later if this is broken off.
            self._write(b"0", _CHECKPOINTS, checkpoint_id, _UPLOADING)
            with suppress(FileNotFoundError):  # another publisher retires as well
                self._files.rm_file(self._path(_CHECKPOINTS, checkpoint_id, MANIFEST))
                self._files.rm(self._path(_CHECKPOINTS, checkpoint_id), recursive=True)
                removed.append(checkpoint_id)
        self._sweep()
        return removed

    # --- who serves what ------------------------------------------------------------------------

    @_reaching
    def hold(self, holder: str, checkpoint_ids: Collection[str]) -> None:
        """Say that `holder` serves these for the next ten minutes; repeat it while it does."""
        self._write(new_lease(checkpoint_ids), _LIVE, f"{holder}.json")

    @_reaching
    def release(self, holder: str) -> None:
        with suppress(FileNotFoundError):
            self._files.rm_file(self._path(_LIVE, f"{holder}.json"))

    @_reaching
    def live(self) -> set[str]:
        """The ids under leases that have not ended. Raises CheckpointError for a damaged lease."""
        held: set[str] = set()
        for name in self._names(_LIVE):
            with suppress(FileNotFoundError):  # released meanwhile
                held |= held_by(self._read(_LIVE, name), name)
        return held

    # --- objects --------------------------------------------------------------------------------

    def _path(self, *parts: str) -> str:
        return "/".join((self._root, *parts))

    def _read(self, *parts: str) -> bytes:
        content: bytes = self._files.cat_file(self._path(*parts))
        return content

    def _write(self, content: bytes, *parts: str) -> None:
        """One object, which appears as a whole."""
        path = self._path(*parts)
        self._make_folder(path)
        self._files.pipe_file(path, content)

    def _make_folder(self, path: str) -> None:
        """For places that have folders; others take any path."""
        self._files.makedirs(path.rpartition("/")[0], exist_ok=True)

    def _names(self, folder: str) -> list[str]:
        """Of what is directly below; fsspec would remember an earlier answer."""
        self._files.invalidate_cache()
        try:
            paths = self._files.ls(self._path(folder), detail=False)
        except FileNotFoundError:
            return []
        return [path.rstrip("/").rpartition("/")[2] for path in paths]

    def _manifest(self, checkpoint_id: str) -> Manifest:
        """Raises FileNotFoundError, and CheckpointError for one that is damaged."""
        content = self._read(_CHECKPOINTS, checkpoint_id, MANIFEST)
        return check_id(parse_manifest(content, checkpoint_id), checkpoint_id)

    def _check_sizes(self, manifest: Manifest) -> None:
        self._files.invalidate_cache()
        for entry in manifest.files:
            path = self._path(_CHECKPOINTS, manifest.id, entry.name)
            n_bytes = self._files.info(path)["size"] if self._files.exists(path) else 0
            if n_bytes != entry.n_bytes:
                raise CheckpointError(
                    f"{entry.name} of {manifest.id} has {n_bytes} bytes in the store, its manifest "
                    f"says {entry.n_bytes}: it is cut short or was changed"
                )

    def _sweep(self) -> None:
        """Remove what dead publishers left."""
        for checkpoint_id in self._names(_CHECKPOINTS):
            base = (_CHECKPOINTS, checkpoint_id)
            if self._files.exists(self._path(*base, MANIFEST)):
                continue
            with suppress(FileNotFoundError, ValueError):  # gone, or of another make
                if time.time() - float(self._read(*base, _UPLOADING)) > STALE_S:
                    self._files.rm(self._path(*base), recursive=True)


def _inside(name: str, checkpoint_id: str) -> PurePosixPath:
    """A path that cannot lead out of the folder. Raises CheckpointError."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise CheckpointError(
            f"the manifest of {checkpoint_id} names {name[:100]!r}, no file of it"
        )
    return path
