"""What an evaluation consists of, and the register of tasks.

A task makes samples; a sample is one request with its media and the means to score the answer; a
group is a row of the report. Knows: types and names. Does not know: what is asked (`tasks`), how
it is asked (`runner`). Source: this project's own.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

from molmo_core.errors import NotFound

Verb = Literal["point", "count", "track", "caption", "query"]
Metric = Literal["f1", "accuracy", "mean_f1"]
"""f1: micro over counts; accuracy: share of samples that are right; mean_f1: mean of
samples' own F1."""
_TASK_MODULES = ("molmo_evals.tasks.scenes",)


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """What one answer is worth. `numbers` are, by the group's metric, n_hits, n_predicted and
    n_true (f1), or value in 0-1 (accuracy, mean_f1)."""

    numbers: Mapping[str, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One request. `media` draws or reads the files when they are needed; `score` gets the
    typed answer of the verb; `failed` is the score of a request without an answer."""

    key: str
    group: str
    verb: Verb
    text: str
    media: Callable[[], list[bytes]]
    score: Callable[[Any], Score]
    failed: Score


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """A row of the report; `target` is the least value that passes, None for no promise."""

    name: str
    metric: Metric
    what: str
    target: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """`samples(seed, n)` yields `n` samples for each group, the same ones for the same seed."""

    name: str
    what: str
    groups: tuple[Group, ...]
    samples: Callable[[int, int], Iterator[Sample]]

    def group(self, name: str) -> Group:
        return next(group for group in self.groups if group.name == name)


_REGISTER: dict[str, Task] = {}


def task(
    name: str, *, what: str, groups: tuple[Group, ...]
) -> Callable[[Callable[[int, int], Iterator[Sample]]], Task]:
    """Register the decorated function as the samples of a task; list its module above."""

    def register(samples: Callable[[int, int], Iterator[Sample]]) -> Task:
        if name in _REGISTER:
            raise ValueError(f"there is a task {name!r} already; choose another name")
        _REGISTER[name] = Task(name=name, what=what, groups=groups, samples=samples)
        return _REGISTER[name]

    return register


def all_tasks() -> tuple[Task, ...]:
    for module in _TASK_MODULES:
        import_module(module)
    return tuple(_REGISTER[name] for name in sorted(_REGISTER))


def find_task(name: str) -> Task:
    """Raises NotFound, with near matches, for a name that is not registered."""
    tasks = {one.name: one for one in all_tasks()}
    if name in tasks:
        return tasks[name]
    near = difflib.get_close_matches(name, tasks, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(tasks)}"
    raise NotFound(f"there is no eval task {name!r}; {hint}")
