"""
The command `shiftworker`: start the processes, ask how they are, send jobs.
"""

from __future__ import annotations

import sys

import typer
from dotenv import find_dotenv, load_dotenv
from rich.markup import escape

from common.errors import Misconfigured, ShiftworkerError
from worker.bench.commands import app as bench
from worker.cli import dead, jobs, machine, plan, processes, workers
from worker.cli.console import EXIT_CONFIG, EXIT_UNAVAILABLE, err

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="One GPU, many models, one queue.",
)
for commands in (processes, machine, plan, workers, jobs):
    app.add_typer(commands.app)
app.add_typer(bench, name="bench")
app.add_typer(dead.app, name="dead")


def main() -> None:
    """Run the command line; an error of ours is one clear sentence and an exit code, never a traceback."""
    load_dotenv(find_dotenv(usecwd=True))  # .env beside the caller; what the environment says already stays
    try:
        app()
    except ShiftworkerError as error:
        err.print(f"[bold red]{error.kind}[/]: {escape(error.message)}", highlight=False, soft_wrap=True)
        sys.exit(EXIT_CONFIG if isinstance(error, Misconfigured) else EXIT_UNAVAILABLE)
