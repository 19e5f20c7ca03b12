"""A run before any weight is loaded: its model's sizes, its datasets, what a step takes.

Everything that a user can have got wrong is found here.
Knows: checkpoints' settings, datasets by name, a user's files. Does not know: weights, steps.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from transformers import PreTrainedTokenizerFast

from molmo_core.errors import TrainingError
from molmo_core.images import ImageGeometry
from molmo_core.videos import VideoGeometry
from molmo_hf.configuration_molmo2 import Molmo2Config
from molmo_hf.modeling_molmo2 import Molmo2ForConditionalGeneration
from molmo_training.checkpoints.opened import OpenedCheckpoint, open_checkpoint
from molmo_training.data.formatting import Formatter
from molmo_training.data.lanes import StreamConfig
from molmo_training.data.mixture import Share, effective_shares
from molmo_training.data.rows import FormattedRows, RowTable
from molmo_training.data.tokenize import Tokenizing
from molmo_training.data.tree import TreeLimits
from molmo_training.freezing import GroupCount, freeze
from molmo_training.launch.held_out import HeldOutPacks
from molmo_training.launch.tables import LEARNT, names_in, tables_of
from molmo_training.lora import add_adapters
from molmo_training.parallel.mesh import Mesh
from molmo_training.recipes import tiny
from molmo_training.train_config import DatasetSettings, HeldOutConfig, ModelConfig, TrainConfig
from molmo_training.vocabulary import load_vocabulary

_AS_OTHERS = DatasetSettings(datasets=())


@dataclass(frozen=True, kw_only=True)
class Start:
    """What a run starts from, its weights left aside."""

    opened: OpenedCheckpoint | None
    config: Molmo2Config
    images: ImageGeometry
    videos: VideoGeometry
    tokenizer: PreTrainedTokenizerFast
    is_tied: bool = False
    """Whether the language head is the embedding."""


class Plan:
    """What `config` asks for, checked. Raises MolmoError for whatever cannot be."""

    def __init__(self, config: TrainConfig) -> None:
        self.start = open_start(config)
        mixture, tables = tables_of(config.data)
        self.config = replace(config, data=replace(config.data, mixture=mixture))
        self.micro_batches(n_readers=1)
        self._check_budgets()
        self.sources = {
            name: self._rows(name, LEARNT, tables[name, LEARNT]) for name in names_in(mixture)
        }
        self.shares: tuple[Share, ...] = effective_shares(mixture, self.sizes)
        self.counts = self._counted()
        self.held_out = [
            self._held_out(held_out, tables[held_out.dataset, held_out.split])
            for held_out in config.data.held_out
        ]

    @property
    def sizes(self) -> dict[str, int]:
        """Examples of each dataset."""
        return {name: len(source) for name, source in self.sources.items()}

    @property
    def stream_config(self) -> StreamConfig:
        data = self.config.data
        return StreamConfig(
            mixture=data.mixture,
            budgets=data.budgets,
            n_lanes=data.packs_per_step,
            buffer_size=data.buffer_size,
            rows_per_batch=data.packs_per_batch,
            seed=data.seed,
            n_bad_allowed=data.n_bad_allowed,
            bad_share_allowed=data.bad_share_allowed,
        )

    def micro_batches(self, n_readers: int) -> int:
        """Batches of a rank in a step, where so many ranks read different ones."""
        data = self.config.data
        if data.packs_per_step % (n_readers * data.packs_per_batch):
            readers = "a rank that reads" if n_readers == 1 else f"{n_readers} ranks that read"
            raise TrainingError(
                f"data.packs_per_step is {data.packs_per_step}; {readers} data.packs_per_batch="
                f"{data.packs_per_batch} at a time: give a multiple of "
                f"{n_readers * data.packs_per_batch}"
            )
        return data.packs_per_step // (n_readers * data.packs_per_batch)

    def check_ranks(self, mesh: Mesh) -> None:
        """Raise TrainingError for a division of the work that this run cannot have."""
        self.micro_batches(mesh.dp_size)
        if self.config.model.object_lessons and (mesh.cp_size > 1 or mesh.is_sharded):
            raise TrainingError(
                "model.object_lessons needs whole rows and weights; set parallel.context_degree to "
                "1 and parallel.shard to none"
            )

    @cached_property
    def tokenizing(self) -> Tokenizing:
        data, start = self.config.data, self.start
        return Tokenizing(
            encode=partial(_encoded, start.tokenizer)
            if start.opened is not None
            else load_vocabulary().encode,
            images=start.images,
            videos=start.videos,
            bos_id=start.tokenizer.bos_token_id,
            weighting=data.weighting,
            limits=TreeLimits(max_tokens=data.budgets.n_tokens),
            subtitles_within_s=data.subtitles_within_s,
        )

    def _rows(self, name: str, split: str, table: RowTable) -> FormattedRows:
        data = self.config.data
        special = next((s for s in data.settings_of if name in s.datasets), _AS_OTHERS)
        formats = replace(data.format, is_training=split == LEARNT)
        p_high_res = special.p_high_res or data.media.p_high_res
        return FormattedRows(
            table=table,
            formatter=Formatter(settings=formats, weight=special.loss),
            tokenizing=self.tokenizing,
            media=replace(data.media, max_frames=self._max_frames, p_high_res=p_high_res),
        )

    def _held_out(self, held_out: HeldOutConfig, table: RowTable) -> HeldOutPacks:
        data = self.config.data
        return HeldOutPacks(
            name=held_out.name,
            source=self._rows(held_out.dataset, held_out.split, table),
            n_examples=held_out.n_examples,
            budgets=data.budgets,
            buffer_size=data.buffer_size,
            packs_per_batch=data.packs_per_batch,
        )

    def _counted(self) -> list[GroupCount]:
        """Parameters that are trained and frozen; patterns that match nothing are found here."""
        with torch.device("meta"):
            model = Molmo2ForConditionalGeneration(self.start.config)
        return choose_trained(model, self.config.model, is_tied=self.start.is_tied)

    @property
    def _max_frames(self) -> int:
        """Of a video: as it is said, or as the checkpoint has it and a pack can hold."""
        data = self.config.data
        return data.media.max_frames or min(self.start.videos.max_frames, data.budgets.n_crops)

    def _check_budgets(self) -> None:
        data, n_crops = self.config.data, self.start.images.max_crops
        if data.media.p_high_res or any(special.p_high_res for special in data.settings_of):
            n_crops = max(n_crops, data.media.high_res_crops)
        needed = {"one image": n_crops + 1, "one video": self._max_frames}
        if data.media.max_images is not None:
            each = data.media.max_multi_image_crops or self.start.images.max_crops
            needed[f"{data.media.max_images} images"] = data.media.max_images * (each + 1)
        what, most = max(needed.items(), key=lambda item: item[1])
        if data.budgets.n_crops < most:
            raise TrainingError(
                f"data.budgets.n_crops is {data.budgets.n_crops}; {what} may take {most}: raise "
                "it, or lower data.max_crops, data.media.max_images, "
                "data.media.max_multi_image_crops or data.media.max_frames"
            )


def open_start(config: TrainConfig) -> Start:
    """The settings of what a run starts from, as the recipe changes them. Raises MolmoError."""
    model, data = config.model, config.data
    if model.start is None:
        opened, settings = None, tiny.tiny_config()
        images, videos = tiny.IMAGES, tiny.VIDEOS
        tokenizer = load_vocabulary().for_transformers()
    else:
        opened = open_checkpoint(model.start, max_model_len=model.max_tokens)
        opened.check_complete()
        settings, images, videos = opened.config, opened.images, opened.videos
        tokenizer = opened.tokenizer()
    if model.bidirectional is not None:
        settings.bidirectional = model.bidirectional
    if data.max_crops is not None:
        images = replace(images, max_crops=data.max_crops)
    if data.media.max_frames is not None:
        videos = replace(videos, max_frames=data.media.max_frames)
    return Start(
        opened=opened,
        config=settings,
        images=images,
        videos=videos,
        tokenizer=tokenizer,
        is_tied=opened is not None and opened.has_tied_head(),
    )


def choose_trained(
    model: Molmo2ForConditionalGeneration, config: ModelConfig, *, is_tied: bool
) -> list[GroupCount]:
    """Freeze, or put adapters beside, what the config says; returns the counts by group.

    A tied head becomes the embedding itself, so that they stay the same.
    """
    if is_tied:
        model.lm_head.weight = model.model.transformer.wte.embedding
    if config.lora is not None:
        return add_adapters(model, config.lora)
    return freeze(model, (*config.trained.frozen(has_tied_head=is_tied), *config.freeze))


def _encoded(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return ids
