"""What a published checkpoint consists of: the manifest, and folders compared with it; and what is
so in every store: the pointer, ids, what retirement leaves alone.

Knows: files, sizes, SHA-256. Does not know: where stores are, models, engines.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from molmo_core.errors import CheckpointError

MANIFEST, CURRENT = "manifest.json", "CURRENT"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,80}")
"""Of checkpoints and of their ids."""
STALE_S = 24 * 3600.0
"""What a dead publisher left is removed when it is so old."""
_HASH_BYTES = 1 << 22


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


def new_id(name: str, files: tuple[FileEntry, ...]) -> str:
    """`<name>-<12 hex digits>`: the digits follow from the content.

    Raises CheckpointError for a name that is none.
    """
    if not NAME.fullmatch(name):
        raise CheckpointError(
            f"the name is {name[:100]!r}; allowed are letters, digits, '.', '_' and '-'"
        )
    digest = hashlib.sha256(json.dumps([f.model_dump() for f in files]).encode()).hexdigest()
    return f"{name}-{digest[:12]}"


def read_manifest(folder: Path) -> Manifest:
    """Raises CheckpointError when it is missing or is none."""
    try:
        return parse_manifest((folder / MANIFEST).read_bytes(), folder.name)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{folder.name} has no {MANIFEST}: it was not published, or not to its end"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{MANIFEST} of {folder.name} cannot be read ({error})") from error


def parse_manifest(content: bytes, name: str) -> Manifest:
    """`name`: of the checkpoint, for messages. Raises CheckpointError."""
    try:
        return Manifest.model_validate_json(content)
    except ValidationError as error:
        raise CheckpointError(f"{MANIFEST} of {name} cannot be read ({error})") from error


def verified(folder: Path, checkpoint_id: str | None = None) -> Manifest:
    """Read every file and compare with the manifest, which is that of `checkpoint_id`.

    Raises CheckpointError, saying what is wrong.
    """
    manifest = read_manifest(folder)
    if checkpoint_id is not None:
        check_id(manifest, checkpoint_id)
    check_files(folder, manifest)
    return manifest


def check_id(manifest: Manifest, checkpoint_id: str) -> Manifest:
    """Raises CheckpointError when it belongs to another checkpoint."""
    if manifest.id != checkpoint_id:
        raise CheckpointError(f"the manifest of {checkpoint_id} is that of {manifest.id}")
    return manifest


def pointed_at(content: bytes) -> str:
    """The id that a store's pointer holds. Raises CheckpointError."""
    try:
        name = content.decode().strip()
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{CURRENT} cannot be read ({error})") from error
    if not NAME.fullmatch(name):
        raise CheckpointError(f"{CURRENT} says {name[:100]!r}, which is no id")
    return name


def not_stored(checkpoint_id: str, ids: Sequence[str]) -> CheckpointError:
    """`ids`: what the store has, the oldest first."""
    known = ", ".join(ids[-5:]) or "none"
    return CheckpointError(
        f"the store has no checkpoint {checkpoint_id[:100]!r}; the last ones are: {known}"
    )


def to_retire(ids: Sequence[str], keep: int) -> Sequence[str]:
    """All but the last `keep`. Raises ValueError for fewer than one."""
    if keep < 1:
        raise ValueError(f"keep is {keep}; at least one checkpoint stays")
    return ids[:-keep]


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
