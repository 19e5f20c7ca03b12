"""Which checkpoint a run began with: states that hold only what was trained are nothing without it.

Knows: where it lies, how it is told from others. Does not know: what is in either.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from molmo_core.errors import CheckpointError

ORIGIN = "origin.json"
"""Document of a state: its frozen weights are those of this checkpoint."""
_OF_WEIGHTS = (".safetensors", ".pt", ".distcp")
_BESIDE = (".metadata", "adapter_config.json", ORIGIN)
"""Say what the weights are, or where the rest of them is."""
_N_SAMPLES, _SAMPLE_BYTES = 64, 4096


@dataclass(frozen=True, kw_only=True)
class Origin:
    path: str
    id: str
    """See `id_of`."""

    @staticmethod
    def of(folder: Path) -> Origin:
        folder = folder.resolve()
        return Origin(path=str(folder), id=id_of(folder))

    def document(self) -> dict[str, str]:
        return asdict(self)

    def folder(self) -> Path:
        """Where it lies. Raises CheckpointError when it is gone or has changed."""
        path = Path(self.path)
        if not path.is_dir():
            raise CheckpointError(
                f"the state holds what was trained; the rest is in the checkpoint {self.path!r}, "
                "which is not there: put it, or a link to it, back there"
            )
        self.check(path)
        return path

    def check(self, folder: Path) -> None:
        """Raise CheckpointError unless the weights in `folder` are those that the run began with.

        The place may be another one.
        """
        if (found := id_of(folder)) != self.id:
            raise CheckpointError(
                f"the state holds what was trained beside the checkpoint {self.path!r} "
                f"({self.id}); {str(folder)!r} holds other weights ({found}): put those that the "
                "run began with there"
            )


def read_origin(state: Path) -> Origin | None:
    """What the rest of a state is; None when it is whole. Raises CheckpointError."""
    if not (state / ORIGIN).exists():
        return None
    try:
        return Origin(**json.loads((state / ORIGIN).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{ORIGIN} of {state.name!r} cannot be read ({error})") from error


def id_of(folder: Path) -> str:
    """Told from the sizes of the files of weights and samples of their bytes, not all of them."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.suffix in _OF_WEIGHTS or path.name in _BESIDE:
            n_bytes = path.stat().st_size
            digest.update(f"{path.relative_to(folder).as_posix()} {n_bytes}\n".encode())
            with path.open("rb") as file:
                for begin in range(0, n_bytes, max(n_bytes // _N_SAMPLES, _SAMPLE_BYTES)):
                    file.seek(begin)
                    digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:16]
