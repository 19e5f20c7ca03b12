"""What a model sees of rows: its tokenizer and geometry, with the settings of the SFT stage.

Knows: which checkpoint stands in where none is named. Does not know: files of data, findings,
pages.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from molmo_training.checkpoints.opened import open_checkpoint
from molmo_training.data.formatting import SFT, Formatter
from molmo_training.data.rows import FormattedRows, RowTable
from molmo_training.data.sampling import SFT_MEDIA, MediaSettings
from molmo_training.data.tokenize import Tokenizing
from molmo_training.data.tree import Weighting
from molmo_training.vocabulary import Vocabulary

SFT_WEIGHTING = Weighting(root_subsegments=True, root_length=True)


@dataclass(frozen=True, kw_only=True)
class ModelView:
    """From rows to tokens, and back to what they say."""

    name: str
    tokenizer: Any
    """The complete one, of transformers."""
    tokenizing: Tokenizing
    formatter: Formatter
    media: MediaSettings
    visual_ids: frozenset[int]
    """Tokens that see each other in both directions; empty for a model that looks back only."""

    def rows(self, table: RowTable) -> FormattedRows:
        return FormattedRows(
            table=table, formatter=self.formatter, tokenizing=self.tokenizing, media=self.media
        )


def open_model_view(checkpoint: Path | None = None) -> ModelView:
    """As the checkpoint sees; without one as the packaged molmo2-tiny. Raises CheckpointError."""
    opened = open_checkpoint(checkpoint or _packaged())
    tokenizer = opened.tokenizer()
    images, videos = opened.images, opened.videos
    tokenizing = Tokenizing(
        encode=Vocabulary(tokenizer.backend_tokenizer).encode,
        images=images,
        videos=videos,
        weighting=SFT_WEIGHTING,
    )
    media = replace(
        SFT_MEDIA,
        max_multi_image_crops=min(SFT_MEDIA.max_multi_image_crops or 1, images.max_crops),
        max_frames=min(SFT_MEDIA.max_frames or 1, videos.max_frames),
    )
    config = opened.config
    is_bidirectional = config.bidirectional == "all"
    return ModelView(
        name=opened.folder.name,
        tokenizer=tokenizer,
        tokenizing=tokenizing,
        formatter=Formatter(settings=SFT),
        media=media,
        visual_ids=frozenset(config.visual_token_ids if is_bidirectional else ()),
    )


def _packaged() -> Path:
    return Path(str(files("molmo_hf") / "checkpoints" / "molmo2-tiny"))
