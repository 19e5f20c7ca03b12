"""Reading the weights of a Hugging Face folder, tensor by tensor.

The safetensors library maps a whole file, which a machine smaller than the file refuses. Here the
header is read, then the bytes of one tensor at a time.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from molmo_core.checkpoints.safetensors_header import read_header
from molmo_core.errors import CheckpointError
from molmo_hf.weight_files import DTYPES, INDEX_FILE, Place

_TYPES = {name: dtype for dtype, name in DTYPES.items()}


@dataclass(frozen=True)
class StoredTensor:
    """Where the numbers of a tensor lie: whole, in order, in one file."""

    path: Path
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    def read(self) -> Tensor:
        """Raises CheckpointError when the file ends before."""
        tensor = torch.empty(self.shape, dtype=self.dtype)
        content: memoryview = tensor.view(-1).view(torch.uint8).numpy().data
        n_read = 0
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(self.offset)
                while n_read < len(content) and (n := file.readinto(content[n_read:])):
                    n_read += n
        except OSError as error:
            raise CheckpointError(f"{self.path.name} cannot be read ({error})") from error
        if n_read < len(content):
            raise CheckpointError(f"{self.path.name} is cut short; copy it again")
        return tensor


class StoredWeights:
    """Tensors that lie in files, each read when it is asked for."""

    def __init__(self, tensors: Mapping[str, StoredTensor]) -> None:
        self._tensors = tensors

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self._tensors.items()}

    def read(self, name: str) -> Tensor:
        return self._tensors[name].read()

    def place(self, name: str) -> Place | None:
        tensor = self._tensors[name]
        return Place(tensor.path, tensor.offset, tensor.dtype)


class SafetensorsWeights(StoredWeights):
    """The tensors of the files that the folder's index names, or of its `*.safetensors` files."""

    def __init__(self, folder: Path) -> None:
        tensors: dict[str, StoredTensor] = {}
        for name in _weight_files(folder):
            tensors |= stored_tensors(folder / name)
        super().__init__(tensors)


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file. Raises CheckpointError for a damaged header or a short file."""
    try:
        header, start = read_header(path)
        n_bytes = path.stat().st_size - start
        tensors = {}
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            tensor = StoredTensor(
                path, start + begin, tuple(entry["shape"]), _TYPES[entry["dtype"]]
            )
            n_numbers = math.prod(tensor.shape)
            if not 0 <= begin <= end <= n_bytes or end - begin != n_numbers * tensor.dtype.itemsize:
                raise ValueError(f"{name} would lie at {begin} to {end} of {n_bytes} bytes")
            tensors[name] = tensor
        return tensors
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path.name} of {path.parent.name!r} cannot be read ({error}): it is missing, damaged "
            "or cut short; copy it again"
        ) from error


def _weight_files(folder: Path) -> list[str]:
    index = folder / INDEX_FILE
    if not index.exists():
        found = sorted(path.name for path in folder.glob("*.safetensors"))
        if not found:
            raise CheckpointError(f"{folder.name!r} has no safetensors file")
        return found
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        return sorted({Path(name).name for name in weight_map.values()})
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(
            f"{INDEX_FILE} of {folder.name!r} cannot be read ({error!r}); expected a weight_map"
        ) from error
