"""Everything that decides a training run; a recipe is a function that returns one `TrainConfig`.

Knows: the settings of the parts, their agreement with each other. Does not know: files, weights,
what is trained for what.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from molmo_core.errors import TrainingError
from molmo_training.data.formatting import FormatSettings
from molmo_training.data.formatting.formatter import UNCHANGED, LossWeight
from molmo_training.data.mixture import Group
from molmo_training.data.packing import Budgets
from molmo_training.data.sampling import MediaSettings
from molmo_training.data.tree import UNWEIGHTED, Weighting
from molmo_training.freezing import TrainedParts
from molmo_training.lora import LoraConfig
from molmo_training.parallel.mesh import ParallelConfig
from molmo_training.runs.trackers import WandbConfig
from molmo_training.trainer import TrainerConfig


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What is trained, and which part of it."""

    start: Path | None = None
    """A checkpoint of any form; None: a model of molmo2-tiny's sizes from nothing."""
    bidirectional: Literal["all", "none"] | None = "all"
    """Whether all visual tokens of a prompt see each other; None: as the checkpoint has it."""
    max_tokens: int | None = None
    """Context that the trained checkpoint says it has; None: as it was."""
    residual_dropout: float = 0.0
    response_dropout: float = 0.0
    """Dropout of tokens that are learnt; 0: as `residual_dropout`."""
    trained: TrainedParts = field(default_factory=TrainedParts)
    freeze: tuple[str, ...] = ()
    """Patterns of further parameters that stay as they are."""
    lora: LoraConfig | None = None
    """Adapters are trained instead of the parts."""
    object_lessons: bool = False
    """Whether a model from nothing is also shown what stands where, by data that knows it."""

    def __post_init__(self) -> None:
        for name in ("residual_dropout", "response_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise TrainingError(
                    f"model.{name} is {getattr(self, name)}; allowed is 0 to below 1"
                )
        if self.lora is not None and self.freeze:
            raise TrainingError(
                "model.freeze does not go with model.lora, which freezes all that is not in "
                "model.lora.targets or model.lora.trained: leave one of them out"
            )


@dataclass(frozen=True, kw_only=True)
class DatasetSettings:
    """What differs for some datasets of a mixture."""

    datasets: tuple[str, ...]
    loss: LossWeight = UNCHANGED
    p_high_res: float = 0.0
    """How often a single image is cut into more crops than usual."""


@dataclass(frozen=True, kw_only=True)
class HeldOutConfig:
    """Examples whose loss is looked at while others are learnt."""

    name: str
    dataset: str
    split: str = "validation"
    n_examples: int = 2048
    """The first so many, or all that there are."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is read, how it is written, and what of it makes a step."""

    mixture: Group
    budgets: Budgets
    """Of a pack, which is a row of a batch."""
    packs_per_step: int = 128
    """Of all ranks together: the batch of an optimizer step."""
    packs_per_batch: int = 1
    """What a rank computes at a time."""
    files: tuple[Path, ...] = ()
    """A user's own data, in the mixture under the names of the files."""
    allow_absolute: bool = False
    """Whether those may name media outside of their folder."""
    folder: Path | None = None
    """Where the registered datasets are; None: as the environment says."""
    leave_out_missing: bool = False
    """Train without the datasets whose files are not there; otherwise that is an error."""
    format: FormatSettings = field(default_factory=FormatSettings)
    media: MediaSettings = field(default_factory=MediaSettings)
    max_crops: int | None = None
    """Most tiles of one image; None: as the checkpoint has it."""
    weighting: Weighting = UNWEIGHTED
    settings_of: tuple[DatasetSettings, ...] = ()
    subtitles_within_s: float | None = 1.0
    seed: int = 50_189
    buffer_size: int = 48
    n_bad_allowed: int = 10
    bad_share_allowed: float = 0.01
    """Bad examples that each lane of the stream leaves out: a share of all, and some more."""
    n_workers: int = 2
    n_prefetched: int = 2
    held_out: tuple[HeldOutConfig, ...] = ()

    def __post_init__(self) -> None:
        for name in ("packs_per_step", "packs_per_batch"):
            if getattr(self, name) < 1:
                raise TrainingError(f"data.{name} is {getattr(self, name)}; allowed is 1 and more")


@dataclass(frozen=True, kw_only=True)
class SavingConfig:
    keep: int | None = 1
    """Newest states that stay; None: all."""
    is_async: bool = True
    """Write states behind the training."""
    time_limit_s: float | None = None
    """Save and end after so long, to go on later; None: not before the last step."""
    publish_to: str | None = None
    """A store that gets every saved state, for servers that follow it."""
    publish_name: str = "molmo2"
    publish_keep: int = 3
    evaluation: tuple[str, ...] = ()
    """A command that is run after each publication, beside the training; {checkpoint} and {step}
    in it are replaced. Its output goes to the run's folder."""
    tensorboard: bool | None = None
    """None: where it is installed."""
    wandb: WandbConfig | None = None

    def __post_init__(self) -> None:
        if self.time_limit_s is not None and not self.time_limit_s > 0:
            raise TrainingError(
                f"saving.time_limit_s is {self.time_limit_s:g}; give seconds above 0, or None"
            )


@dataclass(frozen=True, kw_only=True)
class TrainConfig(TrainerConfig):
    recipe: str
    model: ModelConfig
    data: DataConfig
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    saving: SavingConfig = field(default_factory=SavingConfig)

    def __post_init__(self) -> None:
        if self.n_steps < 1:
            raise TrainingError(f"n_steps is {self.n_steps}; at least 1 step is trained")

    def document(self) -> dict[str, Any]:
        """As JSON: what is saved beside a state and compared when a run goes on."""
        document: dict[str, Any] = json.loads(json.dumps(asdict(self), default=str))
        return document


MAY_DIFFER = (
    "log_every",
    "save_every",
    "validate_every",
    "compute.device",
    "compute.activation_checkpointing",
    "compute.compile_blocks",
    "compute.n_threads",
    "compute.steps_between_collections",
    "compute.attention",
    "parallel.context_degree",
    "parallel.context_kind",
    "parallel.replicas",
    "parallel.shard",
    "loss.chunk_size",
    "saving.*",
    "data.folder",
    "data.allow_absolute",
    "data.packs_per_batch",
    "data.n_workers",
    "data.n_prefetched",
    "data.held_out*",
    "data.n_bad_allowed",
    "data.bad_share_allowed",
)
"""Fields that a run may go on with other values of: they do not decide what is learnt."""
