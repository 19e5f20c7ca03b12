"""`molmo batch`: have a file of requests answered in the background, and fetch the answers.

Knows: options, what is told of a batch on the terminal. Does not know: HTTP (`batches`).
"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter
from cyclopts.validators import Number

from molmo_client import terminal
from molmo_client.client import Client
from molmo_client.failures import WrongUsage
from molmo_core.api_batches import Batch
from molmo_core.errors import MolmoError

app = App(
    name="batch",
    help="Have a file of requests answered in the background, and fetch the answers.",
    version_flags=(),
)
Id = Annotated[str, Parameter(help="As `molmo batch submit` printed it")]
Server = Annotated[str | None, Parameter(help="Address; else MOLMO_SERVER, else port 8000 here")]
Wait = Annotated[bool, Parameter(negative=(), help="Until it has ended, telling how far it is")]
AsJson = Annotated[bool, Parameter(negative=(), help="Print JSON")]


@app.command(name="submit")
def submit_command(
    file: Annotated[Path, Parameter(help="Requests, one JSON object a line")],
    /,
    *,
    endpoint: Annotated[str, Parameter(help="The url of its lines, as /v1/point")],
    window: Annotated[str, Parameter(help="Hours after which it ends in any case")] = "24h",
    wait: Wait = False,
    server: Server = None,
) -> None:
    """Upload FILE and begin; prints the id of the batch.

    A line is {"custom_id": "a", "method": "POST", "url": "/v1/point", "body": {…}}.
    """
    with Client(server) as client:
        batch = client.batches.submit(file, endpoint, window=window)
        terminal.say(batch.id)
        if wait:
            sys.stdout.flush()
            _check(client.batches.wait(batch.id, on_change=_tell))


@app.command(name="status")
def status_command(
    batch_id: Id, /, *, wait: Wait = False, json: AsJson = False, server: Server = None
) -> None:
    """How far a batch is."""
    with Client(server) as client:
        if wait:
            batch = client.batches.wait(batch_id, on_change=_tell)
        else:
            batch = client.batches.get(batch_id)
    terminal.say(batch.model_dump_json(indent=2) if json else _in_words(batch))
    if wait:
        _check(batch)


@app.command(name="list")
def list_command(
    *,
    limit: Annotated[int, Parameter(validator=Number(gte=1, lte=100))] = 20,
    json: AsJson = False,
    server: Server = None,
) -> None:
    """The latest batches, newest first."""
    with Client(server) as client:
        for batch in client.batches.latest(limit):
            terminal.say(batch.model_dump_json() if json else f"{batch.id}  {_in_words(batch)}")


@app.command(name="results")
def results_command(
    batch_id: Id,
    /,
    *,
    output: Annotated[
        Path | None, Parameter(help="Write the answers here; else they are printed")
    ] = None,
    errors: Annotated[
        Path | None, Parameter(help="Write here what was answered otherwise than with success")
    ] = None,
    server: Server = None,
) -> None:
    """The answers of a batch that has ended, one JSON object a line."""
    with Client(server) as client, ExitStack() as opened:
        batch = client.batches.get(batch_id)
        if not batch.has_ended:
            raise WrongUsage(
                f"the batch is {_in_words(batch)}; wait for its end: "
                f"molmo batch status {batch_id} --wait"
            )
        to = sys.stdout.buffer if output is None else opened.enter_context(output.open("wb"))
        if batch.output_file_id is not None:
            client.batches.download(batch.output_file_id, to)
        if errors is not None and batch.error_file_id is not None:
            client.batches.download(batch.error_file_id, opened.enter_context(errors.open("wb")))
    if n_failed := batch.request_counts.failed:
        where = f"in {errors}" if errors else "name a file for them with --errors"
        terminal.remark(f"molmo: {n_failed} lines have no good answer: {where}")


@app.command(name="cancel")
def cancel_command(batch_id: Id, /, *, server: Server = None) -> None:
    """Begin no more lines; the answers until then can be fetched."""
    with Client(server) as client:
        terminal.say(_in_words(client.batches.cancel(batch_id)))


def _in_words(batch: Batch) -> str:
    counts = batch.request_counts
    n_done = counts.completed + counts.failed
    failed = f", {counts.failed} without success" if counts.failed else ""
    return f"{batch.status}: {n_done} of {counts.total} answered{failed}"


def _tell(batch: Batch) -> None:
    terminal.remark(f"molmo: {_in_words(batch)}")


def _check(batch: Batch) -> None:
    """Raises MolmoError for a batch that did not come to its end."""
    if batch.status == "completed":
        return
    first = batch.errors.data[0] if batch.errors and batch.errors.data else None
    line = f"line {first.line}: " if first and first.line else ""
    reason = f" ({line}{terminal.shown(first.message)})" if first else ""
    raise MolmoError(f"the batch has {batch.status}{reason}")
