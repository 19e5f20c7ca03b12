"""`molmo checkpoint`: what a folder holds, from one form to another, into a store.

Knows: options, tables, exit codes. Does not know: forms and layouts.
"""

from __future__ import annotations

import json as json_format
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from cyclopts import App, Parameter

from molmo_core.checkpoints import Store, open_store
from molmo_core.errors import CheckpointError, MolmoError
from molmo_training.checkpoints.convert import (
    SHARD_BYTES,
    to_adapter_folder,
    to_hugging_face,
    to_native_folder,
)
from molmo_training.checkpoints.opened import OpenedCheckpoint, n_parameters, open_checkpoint
from molmo_training.checkpoints.publish import publish, publish_as_it_is, store_cache
from molmo_training.checkpoints.verify import Difference, compare
from molmo_training.runs.card import card_of_run, write_card

app = App(
    name="molmo checkpoint", help="Convert, inspect and publish checkpoints.", version_flags=()
)
DtypeName = Literal["float32", "bfloat16", "float16"]
_SIZE_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


class CheckpointsDiffer(MolmoError):
    """`verify` found a difference above the tolerance."""


def _size(text: str) -> int:
    """Bytes of "5GB", "500MB" or a plain number. Raises CheckpointError."""
    number, unit = text.strip().upper(), 1
    for name, factor in _SIZE_UNITS.items():
        if number.endswith(name):
            number, unit = number.removesuffix(name), factor
            break
    try:
        n_bytes = int(float(number) * unit)
    except ValueError:
        n_bytes = 0
    if n_bytes < 1:
        raise CheckpointError(f"--shard-size is {text!r}; expected bytes, or 500MB, or 5GB")
    return n_bytes


@app.command(name="import")
def import_command(
    source: Annotated[Path, Parameter(help="Native checkpoint, run folder, or released folder")],
    out: Annotated[Path, Parameter(help="New folder in the Hugging Face layout")],
    /,
    *,
    tokenizer: Annotated[
        str | None, Parameter(help="The decoder's tokenizer: folder or name on a hub")
    ] = None,
    dtype: Annotated[DtypeName | None, Parameter(help="Of the weights; else as stored")] = None,
    max_model_len: Annotated[int | None, Parameter(help="Most tokens; else as trained")] = None,
    shard_size: Annotated[str, Parameter(help="Most bytes of one file")] = f"{SHARD_BYTES}",
    card: Annotated[
        bool, Parameter(help="Write a model card, of a run of ours", negative=())
    ] = False,
    base_model: Annotated[
        str | None, Parameter(help="For the card: what the run began with, on a hub")
    ] = None,
) -> None:
    """Read a checkpoint of any form and write it as a released folder."""
    n_bytes = _size(shard_size)
    written = card_of_run(source, name=out.name, base_model=base_model) if card else None
    opened = open_checkpoint(source, max_model_len=max_model_len)
    for note in opened.notes:
        _remark(f"note: {note}")
    chosen = None if dtype is None else getattr(torch, dtype)
    to_hugging_face(opened, out, dtype=chosen, tokenizer=tokenizer, shard_bytes=n_bytes)
    if written is not None:
        write_card(out, written)
    _say(f"{out} holds {opened.folder.name} in the Hugging Face layout")


@app.command(name="export")
def export_command(
    source: Path,
    out: Path,
    /,
    *,
    layout: Annotated[Literal["hf", "native"], Parameter(help="What to write")] = "hf",
    tokenizer: str | None = None,
    dtype: DtypeName | None = None,
    max_model_len: int | None = None,
    shard_size: str = f"{SHARD_BYTES}",
) -> None:
    """Write a checkpoint anew: other type or length, other file sizes, or Ai2's native form."""
    if layout == "hf":
        import_command(
            source,
            out,
            tokenizer=tokenizer,
            dtype=dtype,
            max_model_len=max_model_len,
            shard_size=shard_size,
        )
        return
    if dtype is not None:
        raise CheckpointError("--dtype is for --layout hf; the native form keeps what is stored")
    to_native_folder(open_checkpoint(source, max_model_len=max_model_len), out)
    _say(f"{out} holds {source.name} in Ai2's native form")


@app.command(name="adapters")
def adapters_command(
    run: Annotated[Path, Parameter(help="A run that trained adapters")],
    out: Annotated[Path, Parameter(help="New folder in the layout of PEFT")],
    /,
    *,
    start: Annotated[Path, Parameter(help="The checkpoint that the run began with")],
) -> None:
    """Write the adapters of a run by themselves; import writes them merged."""
    to_adapter_folder(run, out, start=start)
    _say(f"{out} holds the adapters of {run.name}")


@app.command(name="show")
def show_command(path: Path, /, *, json: Annotated[bool, Parameter(negative=())] = False) -> None:
    """What kind of checkpoint it is, its sizes, its tokens, and what is missing."""
    facts = describe(open_checkpoint(path))
    if json:
        _say(json_format.dumps(facts, indent=2))
        return
    width = max(map(len, facts))
    for name, value in facts.items():
        lines = value if isinstance(value, list) else [value]
        for k, line in enumerate(lines or ["none"]):
            _say(f"{name if k == 0 else '':{width}}  {line}")


@app.command(name="verify")
def verify_command(
    a: Path,
    b: Path,
    /,
    *,
    tokenizer: str | None = None,
    tolerance: Annotated[float, Parameter(help="Of a log-probability, in nats")] = 1e-4,
    json: Annotated[bool, Parameter(negative=())] = False,
) -> None:
    """Run both on the same prompts and compare; exit code 1 when they differ."""
    differences = compare(open_checkpoint(a), open_checkpoint(b), tokenizer=tokenizer)
    if json:
        _say(json_format.dumps([d.as_dict() for d in differences], indent=2))
    else:
        _say(f"{'prompt':<14} {'tokens':>6} {'same ids':>8} {'max |Δ|':>9} {'other choices':>13}")
        for d in differences:
            ids = "yes" if d.is_same_ids else "no"
            _say(
                f"{d.prompt:<14} {d.n_tokens:>6} {ids:>8} {d.max_logprob:>9.1e} "
                f"{d.n_other_choices:>13}"
            )
    if wrong := [d.prompt for d in differences if not is_within(d, tolerance)]:
        raise CheckpointsDiffer(
            f"{a.name} and {b.name} differ by more than {tolerance:g} on: {', '.join(wrong)}"
        )


@app.command(name="publish")
def publish_command(
    source: Annotated[Path, Parameter(help="Run folder, native checkpoint, or released folder")],
    /,
    *,
    to: Annotated[str, Parameter(help="The store that servers watch: a folder, or s3://…")],
    name: Annotated[str, Parameter(help="Begins the id of the checkpoint")],
    dtype: DtypeName | None = None,
    compute_dtype: DtypeName | None = None,
    tokenizer: str | None = None,
    keep: Annotated[int | None, Parameter(help="Remove older ones but the last so many")] = None,
    probes: Annotated[bool, Parameter(help="Compute what servers compare after loading")] = True,
    shard_size: str = f"{SHARD_BYTES}",
    as_is: Annotated[
        bool, Parameter(negative=(), help="A native one: copy it, servers convert it")
    ] = False,
) -> None:
    """Convert a checkpoint into a store, complete or not at all, and make it the current one."""
    if as_is:
        if dtype or compute_dtype:
            raise CheckpointError("--dtype and --compute-dtype do not go with --as-is")
        as_published = publish_as_it_is(
            source, _store(to), name=name, tokenizer=tokenizer, keep=keep, with_probes=probes
        )
        _say(as_published.id)
        return
    manifest = publish(
        source,
        _store(to),
        name=name,
        dtype=None if dtype is None else getattr(torch, dtype),
        compute_dtype=None if compute_dtype is None else getattr(torch, compute_dtype),
        tokenizer=tokenizer,
        keep=keep,
        with_probes=probes,
        shard_bytes=_size(shard_size),
    )
    _say(manifest.id)


@app.command(name="list")
def list_command(store: str, /, *, json: Annotated[bool, Parameter(negative=())] = False) -> None:
    """The checkpoints of a store, the oldest first, and which one is current."""
    opened = _store(store)
    current = opened.current()
    rows = [opened.manifest(checkpoint_id) for checkpoint_id in opened.ids()]
    if json:
        facts = [row.model_dump(exclude={"files", "probes"}) for row in rows]
        _say(json_format.dumps({"current": current, "checkpoints": facts}, indent=2))
        return
    for row in rows:
        mark = "*" if row.id == current else " "
        step = "" if row.step is None else f" step {row.step}"
        _say(f"{mark} {row.id}  {row.source}{step}")


@app.command(name="rollback")
def rollback_command(
    store: str,
    /,
    *,
    to: Annotated[str | None, Parameter(help="An id; else the one before the current")] = None,
) -> None:
    """Make an earlier checkpoint of a store the current one."""
    opened = _store(store)
    if to is None:
        ids, current = opened.ids(), opened.current()
        before = ids[: ids.index(current)] if current in ids else []
        if not before:
            raise CheckpointError(
                f"there is no checkpoint before {current}; the store holds "
                f"{', '.join(ids) or 'none'}"
            )
        to = before[-1]
    opened.set_current(to)
    _say(to)


def _store(where: str) -> Store:
    return open_store(where, cache=store_cache())


def is_within(difference: Difference, tolerance: float) -> bool:
    return difference.is_same_ids and difference.max_logprob <= tolerance  # false for NaN


def describe(opened: OpenedCheckpoint) -> dict[str, Any]:
    """Facts by name; lists may be empty."""
    text, vit = opened.config.text_config, opened.config.vit_config
    ids = {
        "image start": opened.config.image_start_token_id,
        "patch": opened.config.image_patch_id,
        "frame start": opened.config.frame_start_token_id,
    }
    n_bytes = sum(path.stat().st_size for path in opened.folder.rglob("*") if path.is_file())
    return {
        "kind": str(opened.kind),
        "folder": opened.folder.name,
        "parameters": n_parameters(opened.weights.shapes()),
        "bytes on disk": n_bytes,
        "decoder": f"{text.num_hidden_layers} layers of width {text.hidden_size}, "
        f"{text.num_attention_heads}/{text.num_key_value_heads} heads of {text.head_dim}, "
        f"{text.vocab_size} + {text.additional_vocab_size} rows, qk-norm {text.qk_norm_type}",
        "vision tower": f"{vit.num_hidden_layers} layers of width {vit.hidden_size}, crops of "
        f"{vit.image_default_input_size[0]} px, patches of {vit.image_patch_size} px",
        "context": f"{text.max_position_embeddings} tokens",
        "head": "tied to the embedding" if opened.is_tied else "of its own",
        "visual mask": opened.config.bidirectional,
        "images": f"at most {opened.images.max_crops} crops, pooled {opened.images.pooling_hw}",
        "videos": f"at most {opened.videos.max_frames} frames, {opened.videos.sample_mode}, "
        f"pooled {opened.videos.pooling_hw}",
        "special tokens": [f"{name}: {token_id}" for name, token_id in ids.items()],
        "tokenizer": opened.tokenizer_name or "in the folder",
        "notes": list(opened.notes),
        "differences": opened.differences(),
    }


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")


def _remark(line: str) -> None:
    sys.stderr.write(f"{line}\n")
