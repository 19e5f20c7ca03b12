"""Checkpoints of a store as folders that an engine reads: brought to this machine, converted.

A checkpoint in Ai2's native form is converted by the importer in a child process: it reads
pickled files, which nothing in this process does. What it wrote gets a manifest of its own, with
the id that was published, and is compared with that whenever it is used again.

Knows: the importer's command, where its results are kept. Does not know: stores, engines.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path

from molmo_core import __version__
from molmo_core.checkpoints import (
    MANIFEST,
    Manifest,
    Store,
    describe_files,
    read_manifest,
    verified,
)
from molmo_core.errors import CheckpointError

_NATIVE_CONFIG, _TOKENIZER = "config.yaml", "tokenizer"
_IMPORTER = ("-m", "molmo_client", "checkpoint", "import")
_LOOK_S = 0.2
_LIMIT_S = 3600.0
_UNUSED_S = 24 * 3600.0

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
        target = self._converted_folder(published.id)
        if target.is_dir():
            try:
                return target, verified(target)
            except CheckpointError:  # altered since
                shutil.rmtree(target)
        work = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
        work.mkdir(parents=True)
        try:
            out = work / published.id
            self._run_importer(folder, out, sum(f.n_bytes for f in published.files), on_phase)
            manifest = published.model_copy(update={"files": describe_files(out)})
            (out / MANIFEST).write_text(manifest.model_dump_json(indent=2))
            with suppress(OSError):  # another service was quicker
                out.rename(target)
        finally:
            shutil.rmtree(work, ignore_errors=True)
        return target, verified(target)

    def _converted_folder(self, checkpoint_id: str) -> Path:
        """Another version of the importer may write otherwise."""
        return self._cache / "converted" / f"{checkpoint_id}-{__version__}"

    def tidy(self, held_ids: Collection[str]) -> None:
        """Remove what nobody on this machine has used for a day; `held_ids` are being used."""
        for root in (self._cache / "store", self._cache / "converted"):
            for folder in root.iterdir() if root.is_dir() else ():
                with suppress(FileNotFoundError):  # another service tidies as well
                    if folder.name.removesuffix(f"-{__version__}") in held_ids:
                        os.utime(folder)
                    elif time.time() - folder.stat().st_mtime > _UNUSED_S:
                        shutil.rmtree(folder, ignore_errors=True)

    def _run_importer(self, source: Path, out: Path, n_bytes: int, on_phase: OnPhase) -> None:
        """Raises CheckpointError with what the importer said."""
        if not (source / _TOKENIZER).is_dir():
            raise CheckpointError(
                "it is in Ai2's form without its tokenizer; publish it with --as-is"
            )
        command = [sys.executable, *_IMPORTER, str(source), str(out)]
        command += ["--tokenizer", str(source / _TOKENIZER)]
        # It opens what others wrote: it gets no keys, and asks nobody for files.
        kept = {k: v for k, v in os.environ.items() if not k.startswith("MOLMO_")}
        environment = kept | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
        end = time.monotonic() + _LIMIT_S
        with tempfile.TemporaryFile() as said:
            child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=said,
                env=environment,
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
