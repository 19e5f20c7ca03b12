"""In what the settings of a saved run differ from those it is to go on with.

Knows: nested JSON. Does not know: which settings matter; the caller names those that may differ.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

from molmo_core.errors import TrainingError
from molmo_training.checkpoints.wording import first_of

_ABSENT = "nothing"


def differences(saved: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Dotted names of the fields that differ, with the saved and the given value.

    Items of lists are fields named by their place. A field that one of both lacks is "nothing".
    """
    return dict(_differences("", saved, given))


def check_same(
    saved: Mapping[str, Any], given: Mapping[str, Any], *, may_differ: Iterable[str] = ()
) -> None:
    """Raise TrainingError, naming them, when fields differ that match no pattern of `may_differ`.

    Patterns are those of file names: `log_every`, `data.n_workers`, `optim.*`.
    """
    patterns = tuple(may_differ)
    wrong = [
        f"{name} is {now!r}, was {was!r}"
        for name, (was, now) in differences(saved, given).items()
        if not any(fnmatchcase(name, pattern) for pattern in patterns)
    ]
    if wrong:
        raise TrainingError(
            f"the run cannot go on with other settings: {first_of(wrong, 8)}. Give those "
            "of the saved state, or train in another folder"
        )


def _differences(name: str, saved: Any, given: Any) -> Iterator[tuple[str, tuple[Any, Any]]]:
    if (parts := _parts(saved)) is not None and (others := _parts(given)) is not None:
        for key in [*parts, *(key for key in others if key not in parts)]:
            full = f"{name}.{key}" if name else key
            yield from _differences(full, parts.get(key, _ABSENT), others.get(key, _ABSENT))
    elif saved != given:
        yield name, (saved, given)


def _parts(value: Any) -> Mapping[str, Any] | None:
    if isinstance(value, Mapping):
        return {str(key): part for key, part in value.items()}
    if isinstance(value, list | tuple):
        return {str(place): part for place, part in enumerate(value)}
    return None
