"""From a checkpoint of any form to the store from which servers take their weights.

Knows: what a server needs beside the weights: the probes that it compares after loading.
Does not know: the order of writes (`molmo_core.checkpoints`), the layout (`molmo_hf.export`).
"""

from __future__ import annotations

import base64
import io
import logging
import math
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from molmo_core import __version__
from molmo_core.checkpoints import Manifest, Probe, Store
from molmo_core.errors import CheckpointError
from molmo_core.prompts import Turn, render_chat, verb_prompt
from molmo_core.scenes import draw_scene, sample_scene
from molmo_hf.processing_molmo2 import Molmo2Processor
from molmo_training.checkpoints.convert import SHARD_BYTES, to_hugging_face
from molmo_training.checkpoints.opened import (
    BUNDLED_TOKENIZER,
    NATIVE,
    OpenedCheckpoint,
    load_model,
    open_checkpoint,
)
from molmo_training.runs.step_folder import step_of

logger = logging.getLogger(__name__)

_PROBE_TOKENS = 8
_PROBE_SEED = 7


def store_cache() -> Path:
    """Where this machine keeps what it reads from object stores."""
    return Path("~/.cache/molmo/store").expanduser()


def publish(
    source: Path,
    store: Store,
    *,
    name: str,
    dtype: torch.dtype | None = None,
    compute_dtype: torch.dtype | None = None,
    tokenizer: str | None = None,
    keep: int | None = None,
    with_probes: bool = True,
    shard_bytes: int = SHARD_BYTES,
) -> Manifest:
    """Convert `source`, add manifest and probes, make it the store's current checkpoint.

    With `keep` older ones are removed, unless somebody serves them. Probes run the model once in
    float32 on this machine; without them a server checks files and shapes only.
    Raises CheckpointError.
    """
    opened = open_checkpoint(source)
    with store.staging() as staged:
        out = staged / "checkpoint"
        to_hugging_face(
            opened,
            out,
            dtype=dtype,
            compute_dtype=compute_dtype,
            tokenizer=tokenizer,
            shard_bytes=shard_bytes,
        )
        probes = compute_probes(open_checkpoint(out)) if with_probes else ()
        manifest = store.publish(out, name=name, **_facts(source, opened, probes))
    if keep is not None:
        store.retire(keep)
    return manifest


def publish_as_it_is(
    source: Path,
    store: Store,
    *,
    name: str,
    tokenizer: str | None = None,
    keep: int | None = None,
    with_probes: bool = True,
) -> Manifest:
    """Put a native checkpoint into the store as it is, with its tokenizer: servers convert it.

    Raises CheckpointError, also for a checkpoint that is not native.
    """
    opened = open_checkpoint(source)
    if opened.kind not in NATIVE:
        raise CheckpointError(
            f"{source.name!r} is of the kind {opened.kind.value}; only native ones are published "
            "as they are: leave --as-is out"
        )
    opened.check_complete()
    with store.staging() as staged:
        out = staged / "checkpoint"
        shutil.copytree(opened.folder, out)
        opened.base_tokenizer(tokenizer).save_pretrained(out / BUNDLED_TOKENIZER)
        probes = compute_probes(opened, tokenizer) if with_probes else ()
        manifest = store.publish(out, name=name, **_facts(source, opened, probes))
    if keep is not None:
        store.retire(keep)
    return manifest


def _facts(source: Path, opened: OpenedCheckpoint, probes: tuple[Probe, ...]) -> dict[str, Any]:
    run = source.resolve() if step_of(source) is None else source.resolve().parent
    return {
        "source": run.name,
        "step": opened.step,
        "code_version": __version__,
        "created": time.time(),
        "bidirectional": opened.config.bidirectional,
        "probes": probes,
    }


@torch.inference_mode()
def compute_probes(opened: OpenedCheckpoint, tokenizer: str | None = None) -> tuple[Probe, ...]:
    """Greedy answers to a text and to a picture, as the weights give them in float32."""
    model, processor = load_model(opened), opened.processor(tokenizer)
    scene = draw_scene(sample_scene(np.random.default_rng(_PROBE_SEED), max_side_px=200))
    return tuple(
        _probe(model, processor, question, picture)
        for question, picture in (
            ("What can you do?", None),
            (verb_prompt("point", "objects"), scene),
            (verb_prompt("caption"), scene),
        )
    )


def _probe(
    model: torch.nn.Module, processor: Molmo2Processor, question: str, picture: np.ndarray | None
) -> Probe:
    text = render_chat([Turn(role="user", text=question)], n_images=int(picture is not None))
    media = {} if picture is None else {"images": [picture]}
    inputs = processor(text=text, return_tensors="pt", **media)
    output = model.generate(  # type: ignore[operator]
        **inputs,
        max_new_tokens=_PROBE_TOKENS,
        do_sample=False,
        eos_token_id=processor.tokenizer.eos_token_id,
        return_dict_in_generate=True,
        output_logits=True,
    )
    ids = output.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    logprobs = [
        logits[0].float().log_softmax(-1)[token].item()
        for logits, token in zip(output.logits, ids, strict=True)
    ]
    if not all(map(math.isfinite, logprobs)):
        raise CheckpointError(
            f"the weights answer {question!r} with log-probabilities {logprobs[:4]}: they hold "
            "numbers that are none; publish an earlier step"
        )
    return Probe(
        question=question,
        image_png=None if picture is None else _png(picture),
        answer_ids=tuple(ids),
        logprobs=tuple(round(value, 6) for value in logprobs),
    )


def _png(picture: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()
