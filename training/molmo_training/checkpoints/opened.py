"""Any checkpoint of Molmo2, opened: its configuration and weights under Hugging Face names.

Forms: a released folder (`hf`), Ai2's native ones (`native-sharded`, `native-unsharded`), a run of
this project's trainer (`run`), adapters beside the checkpoint they were trained from (`adapters`).

Knows: how to tell the forms apart and what each holds. Does not know: what is done with them.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from molmo_core.errors import CheckpointError
from molmo_core.images import ImageGeometry
from molmo_core.videos import VideoGeometry
from molmo_hf.configuration_molmo2 import Molmo2Config
from molmo_hf.export import EMBEDDING, HEAD, WithHead, load_processor, save_settings
from molmo_hf.modeling_molmo2 import Molmo2ForConditionalGeneration
from molmo_hf.processing_molmo2 import Molmo2Processor
from molmo_hf.tokenizer import build_tokenizer
from molmo_hf.weight_files import Weights
from molmo_training.checkpoints.adapters import (
    ADAPTER_CONFIG,
    merged_state,
    merged_with,
    read_adapter_config,
    start_of,
)
from molmo_training.checkpoints.names import NATIVE_HEAD, to_hf
from molmo_training.checkpoints.native_config import CONFIG_FILE, read_native_config
from molmo_training.checkpoints.native_weights import (
    CONTENTS_FILE,
    ShardedWeights,
    UnshardedWeights,
)
from molmo_training.checkpoints.origin import read_origin
from molmo_training.checkpoints.run_weights import (
    RUN_SETTINGS as RUN_SETTINGS,
)
from molmo_training.checkpoints.run_weights import (
    is_run_state,
    last_state,
    run_weights,
    settings_of,
)
from molmo_training.checkpoints.safetensors_weights import SafetensorsWeights
from molmo_training.checkpoints.weight_views import OnlyRead, Overlaid, Renamed, shape_differences
from molmo_training.checkpoints.wording import first_line, first_of
from molmo_training.runs.step_folder import step_of

SHARDED, UNSHARDED = "model_and_optim", "model.pt"
_STEP = re.compile(r"step(\d+)(-unsharded)?")


class Kind(StrEnum):
    HF = "hf"
    NATIVE_SHARDED = "native-sharded"
    NATIVE_UNSHARDED = "native-unsharded"
    RUN = "run"
    ADAPTERS = "adapters"


NATIVE = (Kind.NATIVE_SHARDED, Kind.NATIVE_UNSHARDED)
BUNDLED_TOKENIZER = "tokenizer"
"""Folder in a native checkpoint that was published as it is."""


@dataclass(frozen=True, kw_only=True)
class OpenedCheckpoint:
    folder: Path
    kind: Kind
    config: Molmo2Config
    images: ImageGeometry
    videos: VideoGeometry
    weights: Weights
    """Under Hugging Face names; the language head is among them, tied or not."""
    is_tied: bool
    tokenizer_name: str = ""
    """Where the decoder's own tokenizer is, of a native one."""
    own_tokenizer: PreTrainedTokenizerFast | None = None
    """The complete one, where the folder holds it."""
    notes: tuple[str, ...] = field(default=())
    step: int | None = None
    """Of the training, where the folder tells it."""

    def tokenizer(self, base: str | None = None) -> PreTrainedTokenizerFast:
        """The complete tokenizer; `base` names a folder or hub instead of `tokenizer_name`.

        Raises CheckpointError when it cannot be read or does not fit.
        """
        if self.own_tokenizer is not None:
            return self.own_tokenizer
        plain = self.base_tokenizer(base)
        return build_tokenizer(plain, self.config.text_config.vocab_size)

    def base_tokenizer(self, base: str | None = None) -> PreTrainedTokenizerFast:
        """The decoder's own tokenizer, which native checkpoints only name.

        Raises CheckpointError when it cannot be read.
        """
        name = base or self.tokenizer_name
        try:
            plain: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(
                name, trust_remote_code=False
            )
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"the tokenizer {name!r} cannot be read ({first_line(error)}); native "
                "checkpoints only name it: give its folder with --tokenizer"
            ) from error
        return plain

    def processor(self, base: str | None = None) -> Molmo2Processor:
        """The processor with the settings of training. Raises CheckpointError."""
        with TemporaryDirectory() as folder:
            save_settings(
                Path(folder),
                config=self.config,
                tokenizer=self.tokenizer(base),
                images=self.images,
                videos=self.videos,
            )
            return load_processor(folder)

    def has_tied_head(self) -> bool:
        """Whether the language head is the embedding, be it that an export wrote it out."""
        return self.is_tied or torch.equal(self.weights.read(HEAD), self.weights.read(EMBEDDING))

    def expected_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all tensors that the configuration asks for."""
        with torch.device("meta"):
            model = Molmo2ForConditionalGeneration(self.config)
        return {name: tuple(t.shape) for name, t in model.state_dict().items()}

    def differences(self) -> list[str]:
        """What of the weights is missing, not expected or of another shape."""
        return shape_differences(self.weights.shapes(), self.expected_shapes())

    def check_complete(self) -> None:
        """Raise CheckpointError unless the weights are those that the configuration asks for."""
        if wrong := self.differences():
            raise CheckpointError(
                f"the weights of {self.folder.name!r} do not fit its configuration: "
                f"{first_of(wrong)}"
            )


def open_checkpoint(path: Path, *, max_model_len: int | None = None) -> OpenedCheckpoint:
    """Open a folder of any form; of a run folder its last step.

    Raises CheckpointError when it is none, or a form or model that is not read.
    """
    folder = _chosen_folder(path)
    kind = _kind_of(folder)
    weights: Weights
    if kind in (Kind.HF, Kind.RUN):
        return _open_hf(folder, kind, max_model_len)
    if kind is Kind.ADAPTERS:
        start = open_checkpoint(start_of(folder), max_model_len=max_model_len)
        weights = merged_with(start.weights, folder)
        return replace(start, folder=folder, kind=kind, weights=weights)
    native = read_native_config(folder / CONFIG_FILE, max_model_len=max_model_len)
    if kind is Kind.NATIVE_SHARDED:
        weights = ShardedWeights(folder / SHARDED)
    else:
        weights = UnshardedWeights(folder / UNSHARDED)
    if native.is_tied and NATIVE_HEAD in weights.shapes():
        raise CheckpointError(
            f"{folder.name!r} says that its language head is tied, and holds one of its own"
        )
    renamed = Renamed(weights, {to_hf(name): name for name in weights.shapes()})
    return OpenedCheckpoint(
        folder=folder,
        kind=kind,
        config=native.model,
        images=native.images,
        videos=native.videos,
        weights=OnlyRead(WithHead(renamed), native.model),
        is_tied=native.is_tied,
        tokenizer_name=_tokenizer_name(folder, native.tokenizer),
        notes=native.notes,
        step=_step_of(folder),
    )


def load_model(opened: OpenedCheckpoint) -> Molmo2ForConditionalGeneration:
    """The model in float32 on the CPU, for comparisons. Raises CheckpointError."""
    opened.check_complete()
    with torch.device("meta"):
        model = Molmo2ForConditionalGeneration(opened.config)
    # Without drawing weights first: that takes time, and numbers from whoever trains meanwhile.
    model = model.to_empty(device="cpu")
    with torch.no_grad():
        for name, parameter in model.state_dict().items():
            parameter.copy_(opened.weights.read(name))
    return model.eval()


def n_parameters(shapes: Mapping[str, tuple[int, ...]]) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


def _chosen_folder(path: Path) -> Path:
    """The folder itself, or the highest step of a run; sharded before unsharded."""
    if not path.is_dir():
        raise CheckpointError(f"there is no folder {str(path)!r}; expected a checkpoint")
    if (state := last_state(path)) is not None:
        return state
    if _find_kind(path) is not None:
        return path
    steps = [
        (int(match[1]), match[2] is None, child)
        for child in path.iterdir()
        if (match := _STEP.fullmatch(child.name)) and _find_kind(child) is not None
    ]
    return max(steps)[2] if steps else path


def _kind_of(folder: Path) -> Kind:
    kind = _find_kind(folder)
    if kind is None:
        raise CheckpointError(
            f"{folder.name!r} is no checkpoint of Molmo2; expected config.json with safetensors "
            f"(Hugging Face), {CONFIG_FILE} with {UNSHARDED} or {SHARDED}/ (Ai2), step*/ "
            f"(a run of ours), or {ADAPTER_CONFIG} (adapters)"
        )
    return kind


def _find_kind(folder: Path) -> Kind | None:
    if is_run_state(folder):
        return Kind.RUN
    if (folder / "config.json").exists():
        return Kind.HF
    if (folder / SHARDED / CONTENTS_FILE).exists():
        return Kind.NATIVE_SHARDED
    if (folder / UNSHARDED).exists():
        return Kind.NATIVE_UNSHARDED
    return Kind.ADAPTERS if (folder / ADAPTER_CONFIG).exists() else None


def _open_hf(folder: Path, kind: Kind, max_model_len: int | None) -> OpenedCheckpoint:
    settings = settings_of(folder) if kind is Kind.RUN else folder
    try:
        fields = json.loads((settings / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"config.json of {settings.name!r} cannot be read ({error})"
        ) from error
    if fields.get("model_type") != "molmo2":
        raise CheckpointError(
            f"model_type of {folder.name!r} is {fields.get('model_type')!r}; only Molmo2's "
            "checkpoints ('molmo2') are read"
        )
    if max_model_len is not None:
        fields["text_config"]["max_position_embeddings"] = max_model_len
    config = Molmo2Config(**fields)
    processor = load_processor(settings)
    weights: Weights
    is_tied: bool | None = None
    if kind is Kind.RUN:
        weights = run_weights(folder)
        if (origin := read_origin(folder)) is not None:
            start = open_checkpoint(origin.folder())
            is_tied = start.is_tied and HEAD not in weights.shapes()
            weights = Overlaid(start.weights, weights)
        if (settings / ADAPTER_CONFIG).exists():
            weights = merged_state(weights, read_adapter_config(settings))
    else:
        weights = SafetensorsWeights(folder)
    return OpenedCheckpoint(
        folder=folder,
        kind=kind,
        config=config,
        images=processor.image_geometry(),
        videos=processor.video_geometry(),
        weights=WithHead(weights),
        is_tied=HEAD not in weights.shapes() if is_tied is None else is_tied,
        own_tokenizer=processor.tokenizer,
        step=step_of(folder) if kind is Kind.RUN else None,
    )


def _step_of(folder: Path) -> int | None:
    """Native checkpoints tell it by their name."""
    match = _STEP.fullmatch(folder.name)
    return int(match[1]) if match else None


def _tokenizer_name(folder: Path, name: str) -> str:
    """A name that is a folder beside the checkpoint stands for that folder."""
    for base in (folder, folder.parent):
        if (base / name / "tokenizer.json").exists():
            return str(base / name)
    return name
