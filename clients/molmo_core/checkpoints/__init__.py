"""Published checkpoints: complete, never changed, one of them the current one.

manifest            what a checkpoint consists of, and whether a folder is that
folder_store        a store in a folder
object_store        a store in an object store (S3, GCS, Azure, …), through fsspec
leases              who serves what, so that retention leaves it alone
safetensors_header  names, types and shapes of the tensors of a file

A store is opened by `open_store`; both kinds do the same.
"""

from __future__ import annotations

from pathlib import Path

from molmo_core.checkpoints.folder_store import FolderStore
from molmo_core.checkpoints.manifest import (
    MANIFEST,
    FileEntry,
    Manifest,
    Probe,
    check_files,
    describe_files,
    read_manifest,
    verified,
)
from molmo_core.checkpoints.object_store import ObjectStore

Store = FolderStore | ObjectStore


def open_store(where: str | Path, *, cache: Path) -> Store:
    """`where`: a folder, or the URL of an object store (`s3://bucket/models`).

    `cache`: where checkpoints of an object store are kept on this machine. Raises CheckpointError
    for a URL of a kind that cannot be opened.
    """
    scheme, separator, path = str(where).partition("://")
    if separator and scheme != "file":
        return ObjectStore(str(where), cache=cache)
    return FolderStore(Path(path if separator else where))


__all__ = [
    "MANIFEST",
    "FileEntry",
    "FolderStore",
    "Manifest",
    "ObjectStore",
    "Probe",
    "Store",
    "check_files",
    "describe_files",
    "open_store",
    "read_manifest",
    "verified",
]
