"""Weights tensor by tensor: written as safetensors files without ever holding a whole file.

The safetensors library writes a file from tensors that are all in memory. Here a tensor is read,
cast piece by piece and written before the next one is read, so that the peak is two
tensors, of two files side by side. One
that lies in a file in the right type is copied by the system and not read at all.

Knows: the safetensors format and the index of a folder cut into several files. Does not know:
which tensors a model has, where they come from.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from io import FileIO
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from typing_extensions import Buffer

from molmo_core.errors import CheckpointError

INDEX_FILE = "model.safetensors.index.json"
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_N_AT_ONCE = 2
"""Files written side by side; the peak is so many tensors."""
_PIECE = 1 << 24
"""Elements cast at a time."""


class Weights(Protocol):
    """Named tensors that are read one at a time."""

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Every tensor's shape, without reading it."""
        ...

    def read(self, name: str) -> Tensor:
        """The tensor, on the CPU; the caller lets go of it before asking for the next."""
        ...

    def place(self, name: str) -> Place | None:
        """Where just these numbers lie in a file; None when they do not."""
        ...


@dataclass(frozen=True)
class Place:
    """Numbers of one type in a file, whole and in order."""

    path: Path
    offset: int
    dtype: torch.dtype


@dataclass(frozen=True)
class LoadedWeights:
    """Tensors that are in memory already."""

    tensors: Mapping[str, Tensor]

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    def read(self, name: str) -> Tensor:
        return self.tensors[name].detach().to("cpu")

    def place(self, name: str) -> Place | None:
        return None


def write_weights(
    weights: Weights, folder: Path, *, dtype: torch.dtype, shard_bytes: int = 5_000_000_000
) -> list[Path]:
    """Write all tensors as `dtype` into files of at most `shard_bytes` (or one tensor).

    Returns the files; several come with an index. Raises ValueError for a type that is no float.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype}, allowed are {[str(d) for d in DTYPES]}")
    shapes = weights.shapes()
    shards = _shards(shapes, dtype.itemsize, shard_bytes)
    names = ["model.safetensors"]
    if len(shards) > 1:
        total = len(shards)
        names = [f"model-{k:05d}-of-{total:05d}.safetensors" for k in range(1, total + 1)]
    with ThreadPoolExecutor(_N_AT_ONCE) as pool:
        write = partial(_write_file, weights=weights, shapes=shapes, dtype=dtype)
        list(pool.map(write, [folder / name for name in names], shards))
    if len(shards) > 1:
        total_bytes = sum(_n_elements(shape) for shape in shapes.values()) * dtype.itemsize
        index = {
            "metadata": {"total_size": total_bytes},
            "weight_map": {
                name: file for file, shard in zip(names, shards, strict=True) for name in shard
            },
        }
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
    return [folder / name for name in names]


def _write_file(
    path: Path,
    shard: Sequence[str],
    *,
    weights: Weights,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
) -> None:
    with path.open("wb", buffering=0) as file:
        _write_all(file, _header(shard, shapes, dtype))
        for name in shard:
            place = weights.place(name)
            if place is not None and place.dtype == dtype:
                _copy(file, place, _n_elements(shapes[name]) * dtype.itemsize)
            else:
                _write_cast(file, weights.read(name), dtype)


def _n_elements(shape: Sequence[int]) -> int:
    total = 1
    for side in shape:
        total *= side
    return total


def _shards(
    shapes: Mapping[str, tuple[int, ...]], item_bytes: int, shard_bytes: int
) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, shape in shapes.items():
        n_bytes = _n_elements(shape) * item_bytes
        if shards[-1] and filled + n_bytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += n_bytes
    return shards


def _header(
    names: Sequence[str], shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype
) -> bytes:
    fields: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name in names:
        end = begin + _n_elements(shapes[name]) * dtype.itemsize
        fields[name] = {
            "dtype": DTYPES[dtype],
            "shape": list(shapes[name]),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text


def _write_cast(file: FileIO, tensor: Tensor, dtype: torch.dtype) -> None:
    flat = tensor.contiguous().view(-1)
    for begin in range(0, flat.numel(), _PIECE):
        piece = flat[begin : begin + _PIECE].to(dtype)
        _write_all(file, piece.view(torch.uint8).numpy())


def _write_all(file: FileIO, content: Buffer) -> None:
    """The system writes less than 2 GiB at a time."""
    rest = memoryview(content)
    while rest:
        rest = rest[file.write(rest) :]


def _copy(file: FileIO, place: Place, n_bytes: int) -> None:
    """Inside the system: the numbers never pass through this process. Raises CheckpointError."""
    with place.path.open("rb", buffering=0) as source:
        offset, end = place.offset, place.offset + n_bytes
        while offset < end:
            n_copied = os.copy_file_range(
                source.fileno(), file.fileno(), end - offset, offset_src=offset
            )
            if n_copied == 0:
                raise CheckpointError(f"{place.path.name} is cut short; copy it again")
            offset += n_copied
