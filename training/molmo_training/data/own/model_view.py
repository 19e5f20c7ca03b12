"""What a model sees of rows in a run: its tokenizer and geometry, with the run's settings.

Knows: which checkpoint stands in where none is named. Does not know: files of data, findings,
pages.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from molmo_hf.configuration_molmo2 import Molmo2Config
from molmo_training.checkpoints.opened import open_checkpoint
from molmo_training.data.formatting import Formatter
from molmo_training.data.packing import Budgets
from molmo_training.data.rows import FormattedRows, RowTable
from molmo_training.data.sampling import MediaSettings
from molmo_training.data.tokenize import Tokenizing
from molmo_training.data.tree import TreeLimits
from molmo_training.train_config import DataConfig
from molmo_training.vocabulary import Vocabulary


@dataclass(frozen=True, kw_only=True)
class ModelView:
    """From rows to tokens, and back to what they say."""

    name: str
    tokenizer: Any
    """The complete one, of transformers."""
    tokenizing: Tokenizing
    formatter: Formatter
    media: MediaSettings
    budgets: Budgets
    """Of a pack; an example with more tokens is cut."""
    visual_ids: frozenset[int]
    """Tokens that see each other in both directions; empty for a model that looks back only."""

    def rows(self, table: RowTable) -> FormattedRows:
        return FormattedRows(
            table=table, formatter=self.formatter, tokenizing=self.tokenizing, media=self.media
        )


def open_model_view(settings: DataConfig, checkpoint: Path | None = None) -> ModelView:
    """As the checkpoint sees; without one as the packaged molmo2-tiny. Raises CheckpointError."""
    opened = open_checkpoint(checkpoint or packaged_checkpoint())
    tokenizer, budgets = opened.tokenizer(), settings.budgets
    images, videos = opened.images, opened.videos
    if settings.max_crops is not None:
        images = replace(images, max_crops=settings.max_crops)
    tokenizing = Tokenizing(
        encode=Vocabulary(tokenizer.backend_tokenizer).encode,
        bos_id=tokenizer.bos_token_id,
        images=images,
        videos=videos,
        weighting=settings.weighting,
        limits=TreeLimits(max_tokens=budgets.n_tokens),
        subtitles_within_s=settings.subtitles_within_s,
    )
    max_frames = settings.media.max_frames or min(videos.max_frames, budgets.n_crops)
    return ModelView(
        name=opened.folder.name,
        tokenizer=tokenizer,
        tokenizing=tokenizing,
        formatter=Formatter(settings=settings.format),
        media=replace(settings.media, max_frames=max_frames),
        budgets=budgets,
        visual_ids=visual_ids_of(opened.config),
    )


def visual_ids_of(config: Molmo2Config) -> frozenset[int]:
    """See `ModelView.visual_ids`."""
    return frozenset(config.visual_token_ids if config.bidirectional == "all" else ())


def packaged_checkpoint() -> Path:
    return Path(str(files("molmo_hf") / "checkpoints" / "molmo2-tiny"))
