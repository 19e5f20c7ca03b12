"""Checkpoints of a store as folders that an engine reads: brought to this machine, converted.

A checkpoint in Ai2's native form is converted by the importer in a child process: it reads
pickled files, which nothing in this process does. What it wrote gets a manifest of its own, with
the id that was published, and is compared with that whenever it is used again.

Knows: the importer's command, where its results are kept. Does not know: stores, engines.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path

from molmo_core.checkpoints import (
    MANIFEST,
    Manifest,
    Store,
    check_files,
    describe_files,
    read_manifest,
)
from molmo_core.errors import CheckpointError

_NATIVE_CONFIG, _TOKENIZER = "config.yaml", "tokenizer"
_IMPORTER = ("-m", "molmo_client", "checkpoint", "import")
_LOOK_S = 0.2
_LIMIT_S = 3600.0

OnPhase = Callable[[str], None]


class LocalCheckpoints:
    """Of one store; `cache` is a folder that only services like this one write to."""

    def __init__(self, store: Store, cache: Path) -> None:
        self._store, self._cache = store, cache
        self._child: subprocess.Popen[bytes] | None = None
        self._is_abandoned = False

    def bring(self, checkpoint_id: str, on_phase: OnPhase) -> tuple[Path, Manifest]:
        """A folder in the released layout with the manifest of just these files.

        May take minutes: call it in a thread. Raises CheckpointError, saying what is wrong, and
        OSError when the store cannot be reached.
        """
        on_phase("verifying")
        folder = self._store.bring(checkpoint_id)
        if not (folder / _NATIVE_CONFIG).exists() or (folder / "config.json").exists():
            return folder, read_manifest(folder)
        return self._converted(folder, on_phase)

    def abandon(self) -> None:
        """End a conversion that is going on; later ones end at once."""
        self._is_abandoned = True
        if self._child is not None:
            self._child.kill()

    def _converted(self, folder: Path, on_phase: OnPhase) -> tuple[Path, Manifest]:
        published = read_manifest(folder)
        target = self._cache / "converted" / published.id
        if target.is_dir():
            try:
                manifest = read_manifest(target)
                check_files(target, manifest)
                return target, manifest
            except CheckpointError:  # altered since
                shutil.rmtree(target)
        partial = target.with_name(f".{published.id}.{uuid.uuid4().hex}")
        partial.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._run_importer(folder, partial, sum(f.n_bytes for f in published.files), on_phase)
            manifest = published.model_copy(update={"files": describe_files(partial)})
            (partial / MANIFEST).write_text(manifest.model_dump_json(indent=2))
            partial.rename(target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return target, manifest

    def _run_importer(self, source: Path, out: Path, n_bytes: int, on_phase: OnPhase) -> None:
        """Raises CheckpointError with what the importer said."""
        command = [sys.executable, *_IMPORTER, str(source), str(out)]
        if (source / _TOKENIZER).is_dir():
            command += ["--tokenizer", str(source / _TOKENIZER)]
        end = time.monotonic() + _LIMIT_S
        with tempfile.TemporaryFile() as said:
            child = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=said
            )
            self._child = child
            try:
                while child.poll() is None and not self._is_abandoned:
                    if time.monotonic() > end:
                        raise CheckpointError(f"the conversion took longer than {_LIMIT_S:g} s")
                    on_phase(f"converting, {min(_written(out) / max(n_bytes, 1), 1):.0%}")
                    time.sleep(_LOOK_S)
            finally:
                child.kill()
                child.wait()
                self._child = None
            if self._is_abandoned:
                raise CheckpointError("the conversion was broken off: the service is ending")
            if child.returncode != 0:
                said.seek(0)
                lines = said.read().decode(errors="replace").strip().splitlines()
                raise CheckpointError(
                    f"it is in Ai2's form and cannot be converted: {lines[-1] if lines else '?'}"
                )


def _written(out: Path) -> int:
    """Bytes that the importer has written so far: it writes beside `out` until it is done."""
    partials = out.parent.glob(f".{out.name}.*.partial")
    return sum(p.stat().st_size for partial in partials for p in partial.rglob("*") if p.is_file())
