"""`molmo eval`: run a task against a server, list the tasks.

Knows: options and where the log goes. Does not know: tasks, requests. Source: this project's own.
"""

from __future__ import annotations

import asyncio
import json as json_format
import re
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter
from rich.console import Console
from rich.progress import Progress, ProgressColumn, TextColumn, TimeElapsedColumn

from molmo_client import AsyncClient, RetryPolicy, WrongUsage, terminal
from molmo_core.errors import InvalidRequest, MolmoError, NotFound
from molmo_evals.log import Entry, RunIdentity
from molmo_evals.report import Row, all_passed, as_json, print_table, report_rows
from molmo_evals.runner import identify, run_task
from molmo_evals.task import Task, all_tasks, find_task
from molmo_evals.tasks.own_points import is_own_file, own_points

LOG_FOLDER = Path("runs") / "evals"
_PATIENT = RetryPolicy(n_retries=6)  # an engine that is started again must not cost samples
_TASK_HELP = "Name of a task (`molmo eval list`), or a JSONL file of pictures with points"
_N_LINES = 20  # of progress, where there is no terminal to draw a bar on

app = App(name="molmo eval", help="Measure a server.", version_flags=())


class TargetMissed(MolmoError):
    """A group is below its target, and --check was given; or a candidate is worse."""


@app.command(name="list")
def list_tasks(*, json: Annotated[bool, Parameter(negative=())] = False) -> None:
    """The tasks and their groups."""
    tasks = all_tasks()
    if json:
        groups = {task.name: [group.name for group in task.groups] for task in tasks}
        terminal.say(json_format.dumps(groups, indent=2))
        return
    for task in tasks:
        terminal.say(f"{task.name}: {task.what}")
        for group in task.groups:
            target = "" if group.target is None else f", target {group.target:.2f}"
            terminal.say(f"  {group.name}: {group.what} ({group.metric}{target})")


@app.command
def run(
    task: Annotated[str, Parameter(help=_TASK_HELP)],
    /,
    *,
    server: Annotated[str | None, Parameter(help="Address; else MOLMO_SERVER")] = None,
    n: Annotated[int, Parameter(help="Samples in each group")] = 200,
    seed: Annotated[int, Parameter(help="Other samples for another number")] = 20261123,
    group: Annotated[
        list[str] | None, Parameter(negative=(), help="Only this group; may be repeated")
    ] = None,
    folder: Annotated[Path, Parameter(help="Where the log of samples is")] = LOG_FOLDER,
    concurrency: Annotated[int, Parameter(help="Requests at a time")] = 8,
    json: Annotated[bool, Parameter(negative=(), help="Print the report as JSON")] = False,
    check: Annotated[bool, Parameter(negative=(), help="Fail when a target is missed")] = False,
) -> None:
    """Ask the server a task's samples and print the report.

    Run it again to go on after a stop: answered samples are not asked again. A missed target is
    no failure of the command, unless --check is given.
    """
    chosen = _chosen(task)
    _check_options(chosen, n, concurrency, group or ())
    identity, rows, path = asyncio.run(
        _run(chosen, server, seed, n=n, folder=folder, groups=group or (), n_at_once=concurrency)
    )
    if json:
        terminal.say(json_format.dumps(as_json(identity, rows), indent=2))
    else:
        print_table(identity, rows, Console())
    if check and not all_passed(rows):
        missed = ", ".join(row.group for row in rows if row.passed is False)
        raise TargetMissed(f"below target: {missed}; the log is {path}")


@app.command
def gate(
    task: Annotated[str, Parameter(help=_TASK_HELP)],
    /,
    *,
    candidate: Annotated[str, Parameter(env_var="MOLMO_GATE_CANDIDATE", help="Model on trial")],
    current: Annotated[str, Parameter(env_var="MOLMO_GATE_CURRENT", help="Model that serves")],
    server: Annotated[str | None, Parameter(help="Address; else MOLMO_SERVER")] = None,
    n: Annotated[int, Parameter(help="Samples in each group")] = 50,
    seed: Annotated[int, Parameter(help="Other samples for another number")] = 20261123,
    group: Annotated[
        list[str] | None, Parameter(negative=(), help="Only this group; may be repeated")
    ] = None,
    tolerance: Annotated[float, Parameter(help="A value may be lower by so much")] = 0.02,
    folder: Annotated[Path, Parameter(help="Where the logs of samples are")] = LOG_FOLDER,
    concurrency: Annotated[int, Parameter(help="Requests at a time")] = 4,
) -> None:
    """Ask two models of a server the same samples; fail when the candidate is worse in a group.

    Made for `MOLMO_GATE_COMMAND="molmo eval gate scenes"`: the server then names both models.
    """
    chosen = _chosen(task)
    _check_options(chosen, n, concurrency, group or ())
    values: list[dict[str, float]] = []
    for model in (current, candidate):
        identity, rows, _ = asyncio.run(
            _run(
                *(chosen, server, seed),
                n=n,
                folder=folder,
                groups=group or (),
                n_at_once=concurrency,
                model=model,
            )
        )
        print_table(identity, rows, Console())
        values.append({row.group: row.value for row in rows})
    old, new = values
    if worse := [name for name, value in old.items() if new[name] < value - tolerance]:
        told = ", ".join(f"{name} {old[name]:.3f} -> {new[name]:.3f}" for name in worse)
        raise TargetMissed(
            f"{candidate} is worse than {current} by more than {tolerance:g}: {told}"
        )


def _chosen(name: str) -> Task:
    try:
        return own_points(Path(name)) if is_own_file(name) else find_task(name)
    except (NotFound, InvalidRequest) as failure:
        raise WrongUsage(failure.message) from failure


def _check_options(task: Task, n: int, concurrency: int, groups: Collection[str]) -> None:
    if n < 1 or concurrency < 1:
        raise WrongUsage(f"--n is {n}, --concurrency {concurrency}; both must be at least 1")
    known = [one.name for one in task.groups]
    unknown = sorted(set(groups) - set(known))
    if unknown:
        raise WrongUsage(
            f"{task.name} has no group {', '.join(unknown)}; choose of: {', '.join(known)}"
        )


async def _run(
    task: Task,
    server: str | None,
    seed: int,
    *,
    n: int,
    folder: Path,
    groups: Collection[str],
    n_at_once: int,
    model: str | None = None,
) -> tuple[RunIdentity, list[Row], Path]:
    async with AsyncClient(server, retries=_PATIENT) as client:
        identity = await identify(task, client, seed, model)
        path = folder / _log_name(identity)
        terminal.remark(f"log: {path}")
        n_samples = n * (len(set(groups)) or len(task.groups))
        with _progress(task.name, n_samples) as on_done:
            entries = await run_task(
                task,
                client,
                identity,
                n=n,
                log=path,
                groups=groups,
                model=model,
                n_at_once=n_at_once,
                on_done=on_done,
            )
    return identity, report_rows(task, entries), path


def _log_name(identity: RunIdentity) -> str:
    """One file for each checkpoint, or a new one could not be measured with the same seed."""
    checkpoint = re.sub(r"[^A-Za-z0-9._-]+", "-", identity.checkpoint)
    return f"{identity.task}-{identity.seed}-{checkpoint}.jsonl"


@contextmanager
def _progress(name: str, n_samples: int) -> Iterator[Callable[[Entry], None]]:
    """What is to be called after every sample: a bar on a terminal, else a line now and then."""
    console = Console(file=sys.stderr)
    if console.is_terminal:
        with Progress(*_columns(), console=console) as progress:
            bar = progress.add_task(name, total=n_samples)
            yield lambda entry: progress.advance(bar)
        return
    n_done = 0

    def on_done(entry: Entry) -> None:
        nonlocal n_done
        n_done += 1
        if n_done * _N_LINES // n_samples != (n_done - 1) * _N_LINES // n_samples:
            terminal.remark(f"{name}: {n_done} of {n_samples}, last {entry.key}")

    yield on_done


def _columns() -> tuple[ProgressColumn, ...]:
    return (
        *Progress.get_default_columns()[:3],
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
    )
