"""Ask a server every sample of a task, several at a time.

Knows: order, concurrency, what is logged when. Does not know: what samples ask, how scores
become a table. Source: this project's own.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Coroutine, Iterable, Iterator
from pathlib import Path

import molmo_core
from molmo_client import AsyncClient, ServerUnreachable
from molmo_evals.log import Entry, RunIdentity, RunLog
from molmo_evals.task import Sample, Task

_LOG = logging.getLogger(__name__)

OnDone = Callable[[Entry], None]


async def identify(
    task: Task, client: AsyncClient, seed: int, model: str | None = None
) -> RunIdentity:
    """What a run against the server as it is now would be; `model` names a checkpoint of it."""
    return RunIdentity(
        task=task.name,
        seed=seed,
        checkpoint=model or (await client.models()).data[0].checkpoint,
        version=molmo_core.__version__,
    )


async def run_task(
    task: Task,
    client: AsyncClient,
    identity: RunIdentity,
    *,
    n: int,
    log: Path,
    groups: Collection[str] = (),
    model: str | None = None,
    n_at_once: int = 8,
    on_done: OnDone = lambda entry: None,
) -> list[Entry]:
    """Entries of all samples of `groups` (empty: all), those of an earlier run in `log` included.

    `model` is asked for by name. A sample that fails is worth its `failed` score. Raises
    ServerUnreachable when the server goes away: the log keeps what was answered, the same call
    goes on from there.
    """
    done: dict[str, Entry] = {}
    with RunLog(log, identity) as kept:
        samples = _wanted(task, identity.seed, n, groups)

        async def work() -> None:
            for sample in samples:  # one iterator for all workers
                entry = kept.entries.get(sample.key)
                if entry is None:
                    entry = await _ask(client, sample, model)
                    kept.append(entry)
                done[entry.key] = entry
                on_done(entry)

        await _all_at_once([work] * n_at_once)
    return [done[key] for key in sorted(done)]


def _wanted(task: Task, seed: int, n: int, groups: Collection[str]) -> Iterator[Sample]:
    return (sample for sample in task.samples(seed, n) if not groups or sample.group in groups)


async def _all_at_once(workers: Iterable[Callable[[], Coroutine[None, None, None]]]) -> None:
    try:
        async with asyncio.TaskGroup() as group:
            for work in workers:
                group.create_task(work())
    except BaseExceptionGroup as failures:  # one cause, told many times
        raise failures.exceptions[0] from None


async def _ask(client: AsyncClient, sample: Sample, model: str | None) -> Entry:
    media = await asyncio.to_thread(sample.media)
    arguments = [media] if sample.verb == "caption" else [media, sample.text]
    options = {} if model is None else {"model": model}
    begin_s = time.monotonic()
    try:
        answer = await getattr(client, sample.verb)(*arguments, **options)
        score, text, error = sample.score(answer), answer.text, None
    except ServerUnreachable:
        raise
    except Exception as failure:  # noqa: BLE001 - one bad sample must not end a run of hours
        _LOG.warning("sample %s failed: %s", sample.key, failure)
        score, text, error = sample.failed, None, f"{type(failure).__name__}: {failure}"
    return Entry(
        key=sample.key,
        group=sample.group,
        verb=sample.verb,
        asked=sample.text,
        numbers=score.numbers,
        seconds=round(time.monotonic() - begin_s, 4),
        text=text,
        error=error,
    )
