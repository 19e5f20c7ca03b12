"""The `molmo` command.

Exit codes: 0 done, 1 the request or command failed, 2 wrong usage, 3 no server reachable, 130
interrupted. Answers go to standard output, everything else to standard error.

Knows: the sub-commands, by name; those of other packages are imported when they are called.
Does not know: what they do. Source: this project's own.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from cyclopts import App, CycloptsError, Parameter

import molmo_core
from molmo_client import terminal
from molmo_client.asking import VERBS
from molmo_client.batch_commands import app as batch_app
from molmo_client.failures import RequestFailed, ServerUnreachable, WrongUsage
from molmo_core.errors import MolmoError

OK, FAILED, WRONG_USAGE, UNREACHABLE, INTERRUPTED = 0, 1, 2, 3, 130


class ExtraMissing(MolmoError):
    """The command needs packages that the base install does not bring."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LazyCommand:
    """`target` is `module:attribute`: an App of cyclopts, or a function for one."""

    name: str
    target: str
    extra: str
    help: str


LAZY_COMMANDS = (
    LazyCommand(
        name="serve",
        target="molmo_server.serve:serve_command",
        extra="cpu",
        help="Serve a checkpoint on this machine.",
    ),
    LazyCommand(
        name="keys",
        target="molmo_server.tenancy.commands:app",
        extra="server",
        help="Make, show and revoke the API keys of a server, and what was used with them.",
    ),
    LazyCommand(
        name="demo",
        target="molmo_demo.app:demo_command",
        extra="demo",
        help="Open the demo page, which asks a server.",
    ),
    LazyCommand(
        name="eval",
        target="molmo_evals.commands:app",
        extra="evals",
        help="Measure a server: `molmo eval run scenes`, `molmo eval list`.",
    ),
    LazyCommand(
        name="train",
        target="molmo_training.commands:app",
        extra="training",
        help="Train: the released stages, small variants of them, your own data.",
    ),
    LazyCommand(
        name="checkpoint",
        target="molmo_training.checkpoints.commands:app",
        extra="training",
        help="Convert, inspect and publish checkpoints: import, export, show, verify, publish.",
    ),
    LazyCommand(
        name="data",
        target="molmo_training.data.own.commands:app",
        extra="training",
        help="Check training data of your own, and show it as the model sees it.",
    ),
)
_AS_CALLED: dict[str, Any] = {
    "exit_on_error": False,
    "print_error": False,
    "result_action": "return_value",
}


def main(tokens: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. `tokens` are those after the program's name."""
    try:
        result = build_app()(sys.argv[1:] if tokens is None else list(tokens), **_AS_CALLED)
        sys.stdout.flush()
    except CycloptsError as failure:
        return _fail(f"{failure} See `molmo --help`.", WRONG_USAGE)
    except WrongUsage as failure:
        return _fail(failure.message, WRONG_USAGE)
    except ServerUnreachable as failure:
        return _fail(failure.message, UNREACHABLE)
    except MolmoError as failure:
        return _fail(_with_details(failure), FAILED)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output has gone; nothing more to tell it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    return result if isinstance(result, int) else OK


def build_app() -> App:
    app = App(
        name="molmo",
        version=molmo_core.__version__,
        help="Serve Molmo2 and ask it to point, count and track.",
        help_epilogue="Exit codes: 0 done, 1 failed, 2 wrong usage, 3 no server reachable.",
    )
    for verb in VERBS:
        app.command(verb)
    app.command(batch_app)
    for row in LAZY_COMMANDS:
        app.command(_forwarding(row))
    return app


def _forwarding(row: LazyCommand) -> App:
    """A command that leaves all its options, `--help` too, to the one it stands for."""

    def forward(
        *tokens: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
    ) -> Any:
        return _loaded(row)(list(tokens), **_AS_CALLED)

    app = App(name=row.name, help=row.help, help_flags=(), version_flags=())
    app.default(forward)
    return app


def _loaded(row: LazyCommand) -> App:
    module_name, _, attribute = row.target.partition(":")
    try:
        target: App | Callable[..., Any] = getattr(importlib.import_module(module_name), attribute)
    except ModuleNotFoundError as failure:
        raise ExtraMissing(
            f"`molmo {row.name}` needs the module {failure.name}, which is not installed; "
            f"install it with: pip install 'molmo-serve[{row.extra}]'"
        ) from failure
    if isinstance(target, App):
        return target
    app = App(name=f"molmo {row.name}", version_flags=())
    app.default(target)
    return app


def _with_details(failure: MolmoError) -> str:
    request_id = failure.request_id if isinstance(failure, RequestFailed) else None
    return f"{failure.message} [request {request_id}]" if request_id else failure.message


def _fail(message: str, code: int) -> int:
    terminal.remark(f"molmo: {' '.join(message.split())}")
    return code


if __name__ == "__main__":
    sys.exit(main())
