"""Whether a checkpoint can be loaded in place of another one, and whether two fit into memory.

Knows: which files and fields must be equal, what a process uses. Does not know: how either is done.
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

import psutil

from molmo_core.checkpoints import Manifest
from molmo_core.errors import CheckpointError
from molmo_server.checkpoints.folder import weight_differences

_SETTINGS = (
    "tokenizer.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)
"""What prompts are made with and answers end with, as the engine read it at its start."""
_FREE_KEYS = ("transformers_version", "auto_map", "_name_or_path")
_MARGIN = 1.1
_CGROUP = Path("/sys/fs/cgroup")


def differences(old: Path, new: Path) -> list[str]:
    """Why the weights of `new` cannot be loaded into an engine that runs `old`; empty if they can.

    Configuration and settings must be the same, and the tensors in names and shapes. Raises
    CheckpointError for weights that cannot be read.
    """
    wrong = []
    if _configuration(old) != _configuration(new):
        wrong.append("config.json differs")
    for name in _SETTINGS:
        a, b = ((folder / name) for folder in (old, new))
        if (a.read_bytes() if a.exists() else None) != (b.read_bytes() if b.exists() else None):
            wrong.append(f"{name} differs")
    return wrong + weight_differences(old, new)


def check_mask(folder: Path, manifest: Manifest) -> None:
    """Raises CheckpointError unless it is computed with the visual mask it was trained with."""
    computed = json.loads((folder / "config.json").read_text()).get("bidirectional", "all")
    if computed != manifest.bidirectional:
        raise CheckpointError(
            f"it was trained with the visual mask {manifest.bidirectional!r}, and its config.json "
            f"says {computed!r}"
        )


def lack_of_memory(pid: int) -> str | None:
    """Why a second process tree like that of `pid` had better not be started; None if it may.

    Of main memory only: what an accelerator lacks, the second engine says by not starting.
    """
    used = 0
    with suppress(psutil.Error):  # ended meanwhile
        root = psutil.Process(pid)
        for process in (root, *root.children(recursive=True)):
            with suppress(psutil.Error):
                used += process.memory_info().rss
    free = _free_memory()
    if free >= used * _MARGIN:
        return None
    return (
        f"a second engine needs about {used * _MARGIN / 1e9:.1f} GB beside the first, free are "
        f"{free / 1e9:.1f} GB"
    )


def _configuration(folder: Path) -> object:
    fields = json.loads((folder / "config.json").read_text())
    return {key: value for key, value in fields.items() if key not in _FREE_KEYS}


def _free_memory() -> int:
    """Bytes, of the machine and of the control group that this process may be in."""
    free: int = psutil.virtual_memory().available
    limit = _CGROUP / "memory.max"
    if limit.exists() and (text := limit.read_text().strip()) != "max":
        used = int((_CGROUP / "memory.current").read_text())
        kept = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        cached = int(kept.get("inactive_file", 0))  # files that were read: given back at need
        free = min(free, int(text) - used + cached)
    return free
