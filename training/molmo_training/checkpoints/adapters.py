"""Adapters as files, and merged into the weights that they were trained beside.

A folder holds `adapter_config.json` and `adapter_model.safetensors` in the layout of the library
PEFT, and `trained.safetensors` where parameters were trained whole. The same configuration
beside the settings of a run says that its state has adapters.

Knows: that layout; that a merged weight is W + alpha / rank · B · A, computed in float32.
Does not know: where the other weights lie (`opened`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)

from molmo_core.errors import CheckpointError
from molmo_hf.weight_files import Place, Weights
from molmo_training.checkpoints.safetensors_weights import StoredWeights, stored_tensors
from molmo_training.checkpoints.weight_views import Overlaid
from molmo_training.lora import LORA_A, LORA_B, LoraConfig

ADAPTER_CONFIG, ADAPTER_FILE = "adapter_config.json", "adapter_model.safetensors"
WHOLE_FILE = "trained.safetensors"
_PEFT_PREFIX = "base_model.model."
_PEFT_PARTS = {LORA_A: "lora_A.weight", LORA_B: "lora_B.weight"}
_PEFT_NAME = re.compile(re.escape(_PEFT_PREFIX) + r"(.+)\.lora_([AB])\.weight")
_OURS = ("targets", "trained")
"""What PEFT does not know; it passes over what stands under `molmo`."""


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """The trained parameters by name, whole and on the CPU: adapters, and what else is trained.

    Of a sharded model every rank must ask; the first one gets them, the others nothing.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    state = get_model_state_dict(model, options=options)
    return {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}


def save_adapters(
    state: Mapping[str, Tensor], folder: Path, config: LoraConfig, *, start: Path
) -> None:
    """Write what `trained_state` gave; `start` is the checkpoint that was trained from.

    Raises CheckpointError when there is no adapter among it, or `folder` is not empty.
    """
    adapters = {name: tensor for name, tensor in state.items() if is_adapter(name)}
    if not adapters:
        raise CheckpointError("the state has no adapters; add them with add_adapters and train")
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise CheckpointError(f"the folder {folder.name!r} is not empty; choose a new name")
    whole = {name: tensor for name, tensor in state.items() if name not in adapters}
    if whole:
        save_file({n: t.contiguous() for n, t in whole.items()}, folder / WHOLE_FILE)
    named = {_to_peft(name): tensor.contiguous() for name, tensor in adapters.items()}
    save_file(named, folder / ADAPTER_FILE, metadata={"format": "pt"})
    layers = {name.rpartition(".")[0] for name in adapters}
    write_adapter_config(folder, config, layers=layers, start=str(start.resolve()))


def write_adapter_config(
    folder: Path, config: LoraConfig, *, layers: Iterable[str] = (), start: str = ""
) -> None:
    """Write the configuration alone, as it stands beside the settings of a run."""
    fields = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": start,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": sorted(layers),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "use_rslora": False,
        "molmo": {name: list(getattr(config, name)) for name in _OURS},
    }
    (folder / ADAPTER_CONFIG).write_text(json.dumps(fields, indent=2) + "\n")


def read_adapter_config(folder: Path) -> LoraConfig:
    """Raises CheckpointError when it cannot be read, or says what is no plain LoRA."""
    fields = _fields(folder)
    if fields.get("peft_type") != "LORA" or fields.get("use_rslora") or fields.get("use_dora"):
        raise CheckpointError(
            f"{ADAPTER_CONFIG} of {folder.name!r} is of type {fields.get('peft_type')!r}; only "
            "plain LoRA, without rslora and dora, is read"
        )
    try:
        return LoraConfig(
            rank=fields["r"],
            alpha=fields["lora_alpha"],
            dropout=fields.get("lora_dropout", 0.0),
            **{name: tuple(value) for name, value in fields.get("molmo", {}).items()},
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{ADAPTER_CONFIG} of {folder.name!r} lacks or spoils a field ({error!r})"
        ) from error


def start_of(folder: Path) -> Path:
    """The checkpoint that the adapters in `folder` belong to. Raises CheckpointError."""
    name = _fields(folder).get("base_model_name_or_path") or ""
    for path in (folder / name, Path(name)):
        if name and path.is_dir():
            return path
    raise CheckpointError(
        f"the checkpoint {name!r} that the adapters in {folder.name!r} were trained from is not "
        f"there; write its folder into base_model_name_or_path of {ADAPTER_CONFIG}"
    )


def read_adapters(folder: Path) -> Weights:
    """The tensors of an adapter folder by the names of `trained_state`. Raises CheckpointError."""
    tensors = {
        _from_peft(name, folder): tensor
        for name, tensor in stored_tensors(folder / ADAPTER_FILE).items()
    }
    if (folder / WHOLE_FILE).exists():
        tensors |= stored_tensors(folder / WHOLE_FILE)
    return StoredWeights(tensors)


def load_adapters(model: nn.Module, folder: Path) -> None:
    """Put saved tensors into a model with the same adapters, sharded or not.

    Raises CheckpointError when names or shapes differ from what the model trains.
    """
    weights = read_adapters(folder)
    found = dict(weights.shapes())
    named = model.named_parameters(remove_duplicate=False)
    wanted = {name: tuple(p.shape) for name, p in named if p.requires_grad}
    if found != wanted:
        names = sorted(n for n in found.keys() | wanted.keys() if found.get(n) != wanted.get(n))
        raise CheckpointError(
            f"{len(names)} tensors of {folder.name!r} are not those that the model trains, the "
            f"first is {names[0]!r} ({found.get(names[0])}, trained is {wanted.get(names[0])}): "
            "give the model the same LoraConfig"
        )
    state = {name: weights.read(name) for name in found}
    options = StateDictOptions(full_state_dict=True, strict=False)
    set_model_state_dict(model, state, options=options)


@dataclass(frozen=True)
class _Merged:
    """Weights in which adapters are added to their layers, tensor by tensor.

    `weights` holds both, by the names of the model with adapters; merged ones come in float32.
    """

    weights: Weights
    scale: float

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        shapes = self.weights.shapes()
        return {name: shape for name, shape in shapes.items() if not is_adapter(name)}

    def read(self, name: str) -> Tensor:
        weight: Tensor = self.weights.read(name)
        if not self._has_adapter(name):
            return weight
        layer = name.removesuffix("weight")
        a, b = (self.weights.read(layer + part).float() for part in (LORA_A, LORA_B))
        return torch.addmm(weight.float(), b, a, alpha=self.scale)

    def place(self, name: str) -> Place | None:
        return None if self._has_adapter(name) else self.weights.place(name)

    def _has_adapter(self, name: str) -> bool:
        layer, _, part = name.rpartition(".")
        return part == "weight" and f"{layer}.{LORA_A}" in self.weights.shapes()


def merged_state(state: Weights, config: LoraConfig) -> Weights:
    """The state of a model with adapters as weights of a model without, read one at a time."""
    return _Merged(state, config.scale)


def merged_with(start: Weights, folder: Path) -> Weights:
    """The weights of a checkpoint with the adapters of `folder` merged into them.

    Raises CheckpointError when they are for other layers or other shapes.
    """
    adapters = read_adapters(folder)
    shapes, found = start.shapes(), adapters.shapes()
    for name in found:
        if not _fits(name, found, shapes):
            raise CheckpointError(
                f"{name!r} {found[name]} of {folder.name!r} does not fit the checkpoint: it was "
                "trained from another model"
            )
    return merged_state(Overlaid(start, adapters), read_adapter_config(folder))


def _fits(
    name: str, found: Mapping[str, tuple[int, ...]], shapes: Mapping[str, tuple[int, ...]]
) -> bool:
    """Whether a tensor of an adapter folder has its place, and B · A the shape of its layer."""
    if not is_adapter(name):
        return shapes.get(name) == found[name]
    layer = name.rpartition(".")[0]
    a, b = (found.get(f"{layer}.{part}", ()) for part in (LORA_A, LORA_B))
    if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
        return False
    return shapes.get(f"{layer}.weight") == (b[0], a[1])


def is_adapter(name: str) -> bool:
    return name.rpartition(".")[2] in _PEFT_PARTS


def _to_peft(name: str) -> str:
    layer, _, part = name.rpartition(".")
    return f"{_PEFT_PREFIX}{layer}.{_PEFT_PARTS[part]}"


def _from_peft(name: str, folder: Path) -> str:
    match = _PEFT_NAME.fullmatch(name)
    if match is None:
        raise CheckpointError(
            f"{ADAPTER_FILE} of {folder.name!r} holds {name!r}; only adapters of linear layers "
            f"('{_PEFT_PREFIX}….lora_A.weight' and B) are read"
        )
    return f"{match[1]}.{LORA_A if match[2] == 'A' else LORA_B}"


def _fields(folder: Path) -> dict[str, Any]:
    try:
        fields: dict[str, Any] = json.loads((folder / ADAPTER_CONFIG).read_text())
        return dict(fields)
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{ADAPTER_CONFIG} of {folder.name!r} cannot be read ({error})"
        ) from error
