"""Reading the weights of Ai2's native checkpoints: one `model.pt`, or a sharded `model_and_optim/`.

Both are pickles. Nothing of a pickle is run here: the table of contents of the sharded form names
classes of the reference's package, for which inert records stand in, and any other name is
refused. Tensors are found with torch's own loader for weights only.

Knows: torch's distributed checkpoint format on disk. Does not know: what the tensors mean.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from molmo_core.errors import CheckpointError
from molmo_hf.weight_files import Place
from molmo_training.checkpoints.safetensors_weights import StoredTensor, StoredWeights
from molmo_training.checkpoints.wording import first_line

CONTENTS_FILE = ".metadata"
MODEL_PREFIX = "model."
"""Of the model's tensors in a sharded checkpoint, which holds the optimizer's too."""
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_OTHERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in _FLOATS + _OTHERS}


class UnshardedWeights(StoredWeights):
    """`model.pt`: a dictionary of tensors, read one at a time."""

    def __init__(self, path: Path) -> None:
        super().__init__(_stored_tensors(path))


def _stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """Where each tensor of a file of torch.save lies. Raises CheckpointError."""
    try:
        with FakeTensorMode():  # torch then notes the place of each storage, and reads none
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"{path.name} cannot be read ({first_line(error)}); expected a dictionary of tensors "
            "as torch.save writes it: copy it again"
        ) from error
    if not isinstance(content, dict) or not all(isinstance(t, Tensor) for t in content.values()):
        raise CheckpointError(
            f"{path.name} holds something else than named tensors; expected the model's state, "
            "without optimizer"
        )
    stored = {}
    for name, tensor in content.items():
        if not tensor.is_contiguous():
            raise CheckpointError(f"{name} of {path.name} does not lie in one piece")
        begin = tensor.untyped_storage()._checkpoint_offset
        if begin is None:
            raise CheckpointError(
                f"{path.name} is of the form that torch wrote before 1.6, in which no tensor is "
                "found without reading all; expected is the present one: torch.save what "
                "torch.load(…, weights_only=True) gives"
            )
        begin += tensor.storage_offset() * tensor.element_size()
        stored[name] = StoredTensor(path, begin, tuple(tensor.shape), tensor.dtype)
    return stored


class ShardedWeights:
    """`model_and_optim/`: pieces of each tensor in files of the ranks, and a table of contents."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        contents = _read_contents(folder / CONTENTS_FILE)
        try:
            self._tensors: dict[str, _Record] = {
                name.removeprefix(MODEL_PREFIX): entry
                for name, entry in contents.state_dict_metadata.items()
                if name.startswith(MODEL_PREFIX) and hasattr(entry, "chunks")
            }
            self._pieces: dict[str, list[tuple[tuple[int, ...], _Record]]] = {}
            for index, where in contents.storage_data.items():
                name = index.fqn.removeprefix(MODEL_PREFIX)
                if index.fqn.startswith(MODEL_PREFIX) and name in self._tensors:
                    self._pieces.setdefault(name, []).append((tuple(index.offset), where))
        except (AttributeError, TypeError) as error:
            raise CheckpointError(
                f"the table of contents of {folder.name!r} lacks a field ({error}); expected a "
                "checkpoint that torch.distributed.checkpoint wrote"
            ) from error

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: tuple(entry.size) for name, entry in self._tensors.items()}

    def read(self, name: str) -> Tensor:
        entry = self._tensors[name]
        sizes = {tuple(chunk.offsets): tuple(chunk.sizes) for chunk in entry.chunks}
        whole = torch.empty(tuple(entry.size), dtype=entry.properties.dtype)
        n_filled = 0
        for offset, where in self._pieces.get(name, []):
            piece = self._piece(name, where)
            if tuple(piece.shape) != sizes.get(offset):
                raise CheckpointError(
                    f"a piece of {name} in {where.relative_path} is {tuple(piece.shape)}, the "
                    f"table of contents says {sizes.get(offset)}: the checkpoint is damaged"
                )
            region = tuple(slice(o, o + n) for o, n in zip(offset, piece.shape, strict=True))
            whole[region] = piece
            n_filled += piece.numel()
        if n_filled != whole.numel():
            raise CheckpointError(
                f"{name} has {n_filled} of its {whole.numel()} numbers; the checkpoint was not "
                "written to its end: copy it again"
            )
        return whole

    def place(self, name: str) -> Place | None:
        return None  # each piece is a file of torch's own kind

    def _piece(self, name: str, where: _Record) -> Tensor:
        path = self._folder / Path(where.relative_path).name  # never outside of the folder
        try:
            with path.open("rb") as file:
                file.seek(where.offset)
                content = file.read(where.length)
            piece = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise CheckpointError(
                f"a piece of {name} in {path.name} cannot be read ({first_line(error)}): copy "
                "the checkpoint again"
            ) from error
        if not isinstance(piece, Tensor):
            raise CheckpointError(f"a piece of {name} in {path.name} is no tensor")
        return piece


class _Record:
    """Stands in for any class that a table of contents names: it only holds fields."""

    def __init__(self, *_: Any) -> None: ...

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"there is no field {name!r}")


class _Properties(_Record):
    """torch's TensorProperties: its state is a tuple that begins with the type."""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.dtype = state[0]


_TABLE = "torch.distributed.checkpoint.metadata"
_RECORDS = {
    (_TABLE, name)
    for name in (
        "Metadata",
        "MetadataIndex",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    )
} | {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("olmo.train.remote_filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StoragePrefix"),
    ("pathlib", "PosixPath"),
}


def is_of_table(module: str, name: str) -> bool:
    """Whether a table of contents has a reason to name it."""
    if module == "torch":
        return name == "Size" or name in _DTYPES
    return (module, name) in _RECORDS or (module, name) == (_TABLE, "TensorProperties")


class _TableUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if not is_of_table(module, name):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint needs")
        if module == "torch":
            return tuple if name == "Size" else _DTYPES[name]
        return _Properties if name == "TensorProperties" else _Record


def _read_contents(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            return _TableUnpickler(file).load()
    except Exception as error:  # a damaged pickle can raise anything
        raise CheckpointError(
            f"the table of contents {path.parent.name}/{path.name} cannot be read "
            f"({first_line(error)}); expected what torch.distributed.checkpoint writes"
        ) from error
