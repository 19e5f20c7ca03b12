"""Tensors computed from those of another checkpoint, each when it is asked for.

Knows: sources and functions by name. Does not know: what either mean.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from molmo_core.errors import CheckpointError
from molmo_hf.weight_files import Place, Weights
from molmo_training.checkpoints.weight_views import shape_differences
from molmo_training.checkpoints.wording import first_line, first_of


@dataclass(frozen=True)
class Derivation:
    """`compute` of the tensors `sources`; None: the one source as it is."""

    sources: tuple[str, ...]
    compute: Callable[..., Tensor] | None = None


class Derived:
    """Weights by `derivations`, whose sources stand in `weights`.

    Raises CheckpointError for a source that is missing or of a shape that cannot be computed with.
    """

    def __init__(self, weights: Weights, derivations: Mapping[str, Derivation]) -> None:
        self._weights, self._derivations = weights, derivations
        found = weights.shapes()
        wanted = dict.fromkeys(s for d in derivations.values() for s in d.sources)
        if missing := [name for name in wanted if name not in found]:
            raise CheckpointError(
                f"the weights lack {first_of(missing)}; expected are those of the configuration "
                "beside them"
            )
        self._shapes = {name: self._shape(name, found) for name in derivations}

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._shapes

    def read(self, name: str) -> Tensor:
        derivation = self._derivations[name]
        tensors = [self._weights.read(source) for source in derivation.sources]
        made: Tensor = tensors[0] if derivation.compute is None else derivation.compute(*tensors)
        return made

    def place(self, name: str) -> Place | None:
        derivation = self._derivations[name]
        if derivation.compute is not None:
            return None
        return self._weights.place(derivation.sources[0])

    def _shape(self, name: str, found: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
        """Computed without numbers."""
        derivation = self._derivations[name]
        shapes = [found[source] for source in derivation.sources]
        if derivation.compute is None:
            return shapes[0]
        try:
            empty = [torch.empty(shape, device="meta") for shape in shapes]
            return tuple(derivation.compute(*empty).shape)
        except (RuntimeError, IndexError) as error:
            raise CheckpointError(
                f"{', '.join(derivation.sources)} have the shapes {shapes}, from which {name} "
                f"cannot be made ({first_line(error)})"
            ) from error


def check_used(
    weights: Weights, derivations: Mapping[str, Derivation], unused: Iterable[str]
) -> None:
    """Raise CheckpointError for tensors that no derivation takes and no pattern lets go."""
    taken = {s for d in derivations.values() for s in d.sources}
    patterns = tuple(unused)
    if strange := [
        name
        for name in weights.shapes()
        if name not in taken and not any(fnmatchcase(name, p) for p in patterns)
    ]:
        raise CheckpointError(
            f"the weights hold {first_of(strange)}, which this architecture does not have; it "
            "would be lost"
        )


def check_shapes(weights: Weights, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise CheckpointError unless the weights are those that the configuration asks for."""
    if wrong := shape_differences(weights.shapes(), expected):
        raise CheckpointError(
            f"the weights do not fit the configuration beside them: {first_of(wrong)}"
        )
