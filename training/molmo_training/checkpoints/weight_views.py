"""Weights seen otherwise, without reading them: other names, fewer of them, those of two together.

Knows: names and shapes. Does not know: files, what tensors mean.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from molmo_hf.configuration_molmo2 import Molmo2Config
from molmo_hf.weight_files import Place, Weights

_UNREAD_LAYER = re.compile(r"model\.vision_backbone\.image_vit\.transformer\.resblocks\.(\d+)\..+")


@dataclass(frozen=True)
class Renamed:
    """Weights under other names: `names` maps each new name to the old one."""

    weights: Weights
    names: Mapping[str, str]

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        shapes = self.weights.shapes()
        return {new: shapes[old] for new, old in self.names.items()}

    def read(self, name: str) -> Tensor:
        tensor: Tensor = self.weights.read(self.names[name])
        return tensor

    def place(self, name: str) -> Place | None:
        return self.weights.place(self.names[name])


@dataclass(frozen=True)
class Overlaid:
    """The weights of both; where a name is in both, those of `over`."""

    under: Weights
    over: Weights

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {**self.under.shapes(), **self.over.shapes()}

    def read(self, name: str) -> Tensor:
        tensor: Tensor = self._holder(name).read(name)
        return tensor

    def place(self, name: str) -> Place | None:
        return self._holder(name).place(name)

    def _holder(self, name: str) -> Weights:
        return self.over if name in self.over.shapes() else self.under


@dataclass(frozen=True)
class OnlyRead:
    """Without the layers of the vision tower behind the last one that is read."""

    weights: Weights
    config: Molmo2Config

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        n_layers = self.config.vit_config.num_hidden_layers
        last = max(k % n_layers for k in self.config.adapter_config.vit_layers)
        shapes = self.weights.shapes()
        return {name: shape for name, shape in shapes.items() if _layer_of(name) <= last}

    def read(self, name: str) -> Tensor:
        tensor: Tensor = self.weights.read(name)
        return tensor

    def place(self, name: str) -> Place | None:
        return self.weights.place(name)


def _layer_of(name: str) -> int:
    match = _UNREAD_LAYER.fullmatch(name)
    return int(match[1]) if match else 0


def shape_differences(
    found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]
) -> list[str]:
    """What is missing, not expected or of another shape, a line each."""
    lines = [f"missing: {name} {shape}" for name, shape in expected.items() if name not in found]
    lines += [f"not expected: {name}" for name in found if name not in expected]
    lines += [
        f"shape of {name}: {found[name]}, expected {shape}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    return lines
