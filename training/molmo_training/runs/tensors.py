"""Weights and optimizer states of a run as named tensors, and in the files of torch's own format.

Names are `model.<parameter>`, `beside.<parameter>` and `optim.<parameter>.<state>`; parameters are
named as in `model.state_dict()` without wrappers. What of an optimizer is no tensor is a JSON
document. An optimizer state is read into tensors that are made for it: optimizers need not have
stepped, and a parameter that never had a gradient has none.

Knows: modules and torch optimizers, sharded (DTensor) or not. Does not know: folders, steps, data.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.optim import Optimizer

from molmo_core.errors import CheckpointError, TrainingError
from molmo_training.checkpoints.native_weights import CONTENTS_FILE, is_of_table
from molmo_training.checkpoints.weight_views import shape_differences
from molmo_training.checkpoints.wording import first_of
from molmo_training.runs.ranks import Ranks, reason_of

MODEL, BESIDE, OPTIMIZER = "model", "beside", "optim"
_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")


def joined(model: nn.Module, beside: nn.Module | None) -> nn.Module:
    """Both under one roof, which gives their parameters the names above."""
    parts = {MODEL: model} if beside is None else {MODEL: model, BESIDE: beside}
    replicated = nn.parallel.DistributedDataParallel
    return nn.ModuleDict(
        {k: part.module if isinstance(part, replicated) else part for k, part in parts.items()}
    )


def model_tensors(both: nn.Module, *, with_frozen: bool = True) -> dict[str, Tensor]:
    """The tensors of the modules themselves, not copies."""
    state, named = get_model_state_dict(both), both.named_parameters(remove_duplicate=False)
    left_out = {_bare(n) for n, p in named if not (with_frozen or p.requires_grad)}
    return {n: t for n, t in state.items() if isinstance(t, Tensor) and n not in left_out}


def optimizer_tensors(both: nn.Module, optimizers: Sequence[Optimizer]) -> dict[str, Tensor]:
    """The tensors of the optimizers themselves, not copies. Raises TrainingError."""
    return {
        f"{OPTIMIZER}.{trained.name}.{key}": value
        for trained in _trained(both, optimizers)
        for key, value in trained.state.items()
        if isinstance(value, Tensor)
    }


def optimizer_document(both: nn.Module, optimizers: Sequence[Optimizer]) -> dict[str, Any]:
    """What is no tensor, for JSON: the settings of groups, and numbers kept for a parameter."""
    names = _names(both, optimizers)
    numbers = {}
    for trained in _trained(both, optimizers):
        kept = {k: v for k, v in trained.state.items() if not isinstance(v, Tensor)}
        if kept:
            numbers[trained.name] = kept
    groups = [
        [
            {"params": [names[p] for p in group["params"]]}
            | {key: _plain(value) for key, value in group.items() if key != "params"}
            for group in optimizer.param_groups
        ]
        for optimizer in optimizers
    ]
    return {"groups": groups, "numbers": numbers}


def state_bytes(
    both: nn.Module, optimizers: Sequence[Optimizer], *, with_frozen: bool = True
) -> int:
    """About how much a state takes on disk: weights, and two moments of each trained parameter."""
    weights = model_tensors(both, with_frozen=with_frozen)
    n_bytes = sum(tensor.nbytes for tensor in weights.values())
    return n_bytes + sum(2 * one.parameter.nbytes for one in _trained(both, optimizers))


def save_tensors(folder: Path, tensors: Mapping[str, Tensor], ranks: Ranks) -> None:
    """Write the tensors, each rank its shards; what all ranks hold is written once.

    Raises CheckpointException, on all ranks, with the errors of those that failed.
    """
    _expect_one_process()
    writer, group = Writer(folder), ranks.group
    save(dict(tensors), storage_writer=writer, process_group=group, no_dist=group is None)


def restore_tensors(
    folder: Path,
    both: nn.Module,
    optimizers: Sequence[Optimizer],
    document: Mapping[str, Any],
    ranks: Ranks,
    *,
    with_frozen: bool = True,
) -> None:
    """Read `folder` into modules and optimizers, each rank its own shards.

    Without optimizers weights alone are read. Raises CheckpointError, on all ranks, when names or
    shapes differ, or files cannot be read.
    """
    reader, group = _Reader(folder), ranks.group
    modules = model_tensors(both, with_frozen=with_frozen)
    trained = _trained(both, optimizers)

    def checked() -> dict[str, dict[str, Tensor]]:
        stored = reader.tensors()
        _check_weights(stored, modules)
        if optimizers:
            _check_groups(document["groups"], optimizer_document(both, optimizers)["groups"])
        return _rooms(stored, trained)

    states = ranks.on_all(checked)
    wanted = modules | {
        f"{OPTIMIZER}.{name}.{key}": tensor
        for name, state in states.items()
        for key, tensor in state.items()
    }
    try:
        _expect_one_process()
        load(wanted, storage_reader=reader, process_group=group, no_dist=group is None)
    except CheckpointException as error:
        raise CheckpointError(
            f"the tensors of {folder.parent.name!r} cannot be read ({reason_of(error)}); go on "
            "from an earlier step"
        ) from error
    set_model_state_dict(both, dict(modules), options=StateDictOptions(strict=with_frozen))
    for optimizer, saved in zip(optimizers, document["groups"], strict=False):
        _set_groups(optimizer, saved)
    for one in trained:
        one.optimizer.state.pop(one.parameter, None)
        if state := states[one.name] | document["numbers"].get(one.name, {}):
            one.optimizer.state[one.parameter] = state


def _expect_one_process() -> None:
    """torch warns at each save and load of a single process; here that is meant."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")


@dataclass(frozen=True, kw_only=True)
class _Trained:
    """A parameter of an optimizer."""

    name: str
    parameter: Tensor
    settings: dict[str, Any]
    optimizer: Optimizer

    @property
    def state(self) -> dict[str, Any]:
        """What the optimizer keeps for it; nothing before its first gradient."""
        kept: dict[str, Any] = self.optimizer.state.get(self.parameter, {})
        return kept


def _trained(both: nn.Module, optimizers: Sequence[Optimizer]) -> list[_Trained]:
    names = _names(both, optimizers)
    return [
        _Trained(name=names[p], parameter=p, settings=group, optimizer=optimizer)
        for optimizer in optimizers
        for group in optimizer.param_groups
        for p in group["params"]
    ]


def _names(both: nn.Module, optimizers: Sequence[Optimizer]) -> dict[Tensor, str]:
    """Of all parameters. Raises TrainingError when an optimizer has one of neither module."""
    names: dict[Tensor, str] = {p: _bare(name) for name, p in both.named_parameters()}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if strange := [tuple(p.shape) for p in group["params"] if p not in names]:
                raise TrainingError(
                    f"an optimizer has parameters {strange[:3]} of neither module; give the "
                    "module that they belong to, as `model` or `beside`"
                )
    return names


def _bare(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) else value


def _check_weights(
    stored: Mapping[str, TensorStorageMetadata], wanted: Mapping[str, Tensor]
) -> None:
    held = {n: tuple(e.size) for n, e in stored.items() if not n.startswith(f"{OPTIMIZER}.")}
    expected = {name: tuple(tensor.shape) for name, tensor in wanted.items()}
    if wrong := shape_differences(held, expected):
        raise CheckpointError(
            f"the saved weights are of another model: {first_of(wrong)}. Go on with the settings "
            "that the run began with"
        )


def _check_groups(saved: Sequence[Any], given: Sequence[Any]) -> None:
    was, now = (
        [[group["params"] for group in groups] for groups in document]
        for document in (saved, given)
    )
    if was != now:
        raise CheckpointError(
            f"the saved optimizers step groups of {_lengths(was)} parameters, the run's "
            f"{_lengths(now)}, or others of as many: go on with the trained parts and groups that "
            "the run began with"
        )


def _lengths(optimizers: Sequence[Sequence[Sequence[str]]]) -> list[list[int]]:
    return [[len(names) for names in groups] for groups in optimizers]


def _rooms(
    stored: Mapping[str, TensorStorageMetadata], trained: Sequence[_Trained]
) -> dict[str, dict[str, Tensor]]:
    """Empty tensors for all that optimizers kept, by parameter and name."""
    kept: dict[str, dict[str, TensorStorageMetadata]] = {}
    for full, entry in stored.items():
        owner, _, key = full.rpartition(".")
        kept.setdefault(owner, {})[key] = entry
    return {
        one.name: {
            key: _room_for(entry, one)
            for key, entry in kept.get(f"{OPTIMIZER}.{one.name}", {}).items()
        }
        for one in trained
    }


def _room_for(entry: TensorStorageMetadata, trained: _Trained) -> Tensor:
    """An empty tensor for what the optimizer kept of a parameter, where it keeps it."""
    parameter, dtype = trained.parameter.detach(), entry.properties.dtype
    if entry.size == parameter.shape:
        return torch.empty_like(parameter, dtype=dtype)
    is_step = not entry.size  # torch keeps it on the CPU but for these
    on_cpu = is_step and not (trained.settings.get("fused") or trained.settings.get("capturable"))
    return torch.empty(entry.size, dtype=dtype, device="cpu" if on_cpu else parameter.device)


def _set_groups(optimizer: Optimizer, saved: Sequence[Mapping[str, Any]]) -> None:
    for group, settings in zip(optimizer.param_groups, saved, strict=True):
        for key, value in settings.items():
            if isinstance(group.get(key), Tensor):
                group[key].fill_(value)
            elif key != "params":
                group[key] = tuple(value) if isinstance(value, list) else value


class Writer(FileSystemWriter):
    """torch's writer, whose table of contents does not name a folder of this machine."""

    def storage_meta(self) -> StorageMeta:
        return StorageMeta()


class _Reader(FileSystemReader):
    """torch's reader, whose table of contents may name nothing but what such a table needs."""

    def tensors(self) -> dict[str, TensorStorageMetadata]:
        """What the files hold. Raises CheckpointError."""
        try:
            entries = self.read_metadata().state_dict_metadata
        except (OSError, EOFError, AttributeError, ImportError, pickle.UnpicklingError) as error:
            raise CheckpointError(
                f"the table of contents in {Path(self.path).parent.name!r} cannot be read "
                f"({reason_of(error)}); go on from an earlier step"
            ) from error
        return {n: e for n, e in entries.items() if isinstance(e, TensorStorageMetadata)}

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        with Path(self.path, CONTENTS_FILE).open("rb") as file:
            metadata: Metadata = _TableUnpickler(file).load()
        return metadata


class _TableUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if not is_of_table(module, name):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no table needs")
        return super().find_class(module, name)
