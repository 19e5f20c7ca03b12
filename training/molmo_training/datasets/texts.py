"""Conversations without pictures.

Knows: the columns of the tables, which conversations are left out. Does not know: templates.
Source: spec of Molmo2's training, section 8.3.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from molmo_core.prompts import fold_system
from molmo_training.data.formatting.row import Row
from molmo_training.data.rows import RowTable
from molmo_training.datasets.files import RecordRows, hub_steps, hub_table
from molmo_training.datasets.registry import dataset
from molmo_training.datasets.tables import ChosenRows, MappedRows

_REPO = "allenai/molmo2-tulu4-classified"
_KINDS_LEFT_OUT = frozenset({"code", "non-english"})
_SOURCES_LEFT_OUT = frozenset(
    {
        "allenai/dino-hardcodes",
        "allenai/hardcoded-olmo",
        "allenai/puzzle_data_160k-ngram-filtered",
        "allenai/verifiable-reasoning-filtered-o4-mini-filtered",
        "faezeb/verifiable-reasoning-v3-o4-mini-length-filtered-verified",
    }
)
_COLUMNS = (
    "category",
    "source",
    "first_message_qwen3_tokens",
    "empty_messages",
    "has_special_token",
)


def _kept(most_tokens: int, rows: RecordRows) -> RowTable:
    """Without code, puzzles, other languages, hard-coded answers, and long first messages."""
    columns = zip(*(rows.column(name).to_pylist() for name in _COLUMNS), strict=True)
    chosen = [
        k
        for k, (kind, source, n_tokens, is_empty, has_special) in enumerate(columns)
        if not (is_empty or has_special)
        and kind not in _KINDS_LEFT_OUT
        and source not in _SOURCES_LEFT_OUT
        and (n_tokens or 0) <= most_tokens
    ]
    return ChosenRows(rows, chosen)


def _conversation(row: Row) -> Row:
    """A system text becomes the beginning of the first question."""
    messages: list[dict[str, Any]] = [dict(message) for message in row["messages"]]
    if len(messages) > 1 and messages[0]["role"] == "system":
        system = messages.pop(0)["content"]
        messages[0]["content"] = fold_system(system, messages[0]["content"])
    if messages and messages[-1]["role"] == "user":
        messages.pop()
    return {"style": "text_sft", "messages": messages}


def _register(name: str, most_tokens: int, *groups: str) -> None:
    @dataset(
        name=name,
        groups=groups,
        source=f"Hugging Face: {_REPO}",
        splits=("train",),
        licence="ODC-BY-1.0",
        manual=hub_steps(_REPO),
    )
    def _(root: Path, split: str) -> RowTable:
        table = hub_table(root, _REPO, split, read=partial(_kept, most_tokens))
        return MappedRows(table, _conversation)


_register("tulu4", 4096, "nlp")
_register("tulu4_max_2304", 2304, "pretrain")
