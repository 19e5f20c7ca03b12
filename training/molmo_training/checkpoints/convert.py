"""From any form of checkpoint to a Hugging Face folder or a native one, from a run to its adapters.

To the Hugging Face layout tensors pass one at a time; torch writes the native file from all of
them. The result appears under its name when it is complete, never before.

Knows: the order of the steps. Does not know: the forms (`opened`), the layout (`molmo_hf.export`).
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor

from molmo_core.errors import CheckpointError
from molmo_hf.export import save_checkpoint
from molmo_training.checkpoints.adapters import (
    ADAPTER_CONFIG,
    is_adapter,
    merged_with,
    read_adapter_config,
    save_adapters,
)
from molmo_training.checkpoints.names import NATIVE_HEAD, to_native
from molmo_training.checkpoints.native_config import (
    CONFIG_FILE,
    NativeConfig,
    write_native_config,
)
from molmo_training.checkpoints.opened import (
    NATIVE,
    UNSHARDED,
    Kind,
    OpenedCheckpoint,
    open_checkpoint,
)
from molmo_training.checkpoints.run_weights import run_weights, settings_of

NATIVE_COPY = "native_config.yaml"
"""The native configuration, kept beside the files of an export, for the way back."""
_SMALL = "model.transformer.ln_f.weight"
"""Every model has it, and its type is that of the others."""
SHARD_BYTES = 5_000_000_000


def to_hugging_face(
    opened: OpenedCheckpoint,
    out: Path,
    *,
    dtype: torch.dtype | None = None,
    compute_dtype: torch.dtype | None = None,
    tokenizer: str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write `out` as a released folder with code for other readers; returns it.

    `dtype` None keeps what the weights are stored in; `compute_dtype` is what readers are told to
    compute in, where that is not `dtype`. Raises CheckpointError when
    the weights do not fit the configuration, `out` exists, or the tokenizer cannot be read.
    """
    opened.check_complete()
    stored = opened.weights.read(_SMALL).dtype
    if compute_dtype is None and dtype is None and opened.kind is Kind.HF:
        compute_dtype = opened.config.dtype
    with appearing(out) as partial:
        save_checkpoint(
            opened.weights,
            partial,
            config=opened.config,
            tokenizer=opened.tokenizer(tokenizer),
            images=opened.images,
            videos=opened.videos,
            dtype=dtype or stored,
            compute_dtype=compute_dtype,
            with_code=True,
            shard_bytes=shard_bytes,
        )
        kept = opened.folder / (CONFIG_FILE if opened.kind in NATIVE else NATIVE_COPY)
        if kept.exists():
            shutil.copyfile(kept, partial / NATIVE_COPY)
    return out


def to_native_folder(opened: OpenedCheckpoint, out: Path) -> Path:
    """Write `out` as an unsharded native checkpoint: `config.yaml` and `model.pt`.

    The head is left out where it is the embedding. Raises CheckpointError as `to_hugging_face`.
    """
    opened.check_complete()
    is_tied = opened.has_tied_head()
    tensors: dict[str, Tensor] = {
        to_native(name): opened.weights.read(name) for name in opened.weights.shapes()
    }
    if is_tied:
        del tensors[NATIVE_HEAD]
    config = NativeConfig(
        model=opened.config,
        images=opened.images,
        videos=opened.videos,
        is_tied=is_tied,
        tokenizer=opened.tokenizer_name or str(opened.folder.resolve()),
    )
    with appearing(out) as partial:
        partial.mkdir()
        torch.save(tensors, partial / UNSHARDED)
        kept = opened.folder / (CONFIG_FILE if opened.kind in NATIVE else NATIVE_COPY)
        if kept.exists():
            shutil.copyfile(kept, partial / CONFIG_FILE)
        else:
            write_native_config(partial / CONFIG_FILE, config)
    return out


def to_adapter_folder(run: Path, out: Path, *, start: Path) -> Path:
    """Write what a run with adapters has trained, unmerged; `start` is what it began with.

    Raises CheckpointError when the run has no adapters, they are not for `start`, or `out` exists.
    """
    opened = open_checkpoint(run)
    settings = settings_of(opened.folder)
    if opened.kind is not Kind.RUN or not (settings / ADAPTER_CONFIG).exists():
        raise CheckpointError(f"{run.name!r} is no run with adapters; what it holds is whole")
    config = read_adapter_config(settings)
    weights = run_weights(opened.folder)
    state = {
        name: weights.read(name)
        for name in weights.shapes()
        if is_adapter(name) or any(fnmatchcase(name, pattern) for pattern in config.trained)
    }
    with appearing(out) as partial:
        save_adapters(state, partial, config, start=start)
        merged_with(open_checkpoint(start).weights, partial)
    return out


@contextmanager
def appearing(out: Path) -> Iterator[Path]:
    """A path beside `out` that becomes `out` when the block ends well, and is removed otherwise."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(
            f"{str(out)!r} exists; a checkpoint is never overwritten: choose a new name"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        yield partial
        os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
