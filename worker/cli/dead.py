"""
`shiftworker dead`: the jobs that were set aside, why, and what to do about them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import closing
from datetime import datetime
from functools import partial
from typing import Annotated, Any

import typer
from rich.console import Group
from rich.markup import escape
from rich.table import Table

from common.client import JobClient
from common.dead_letters import DeadLetters
from common.errors import InvalidRequest
from common.schemas import JobRequest, utc_now
from common.settings import Settings
from worker.cli.console import Json, out, print_json, reach_redis, read_settings

app = typer.Typer(no_args_is_help=True, help="Jobs that were set aside: look at them, retry them, drop them.")

_Id = Annotated[str, typer.Argument(help="As `shiftworker dead list` shows it.")]
_Ids = Annotated[list[str], typer.Argument(help="As `shiftworker dead list` shows them.")]


@app.command(name="list")
def list_letters(*, as_json: Json = False) -> None:
    """Show every job that was set aside, the newest first."""
    letters = _letters(read_settings()).all()
    if as_json:
        print_json({"dead": [letter.model_dump(mode="json") for letter in letters]})
        return
    table = Table("job", "set aside", "model", "why", "faults")
    for letter in letters:
        table.add_row(letter.job_id, _local(letter.at), letter.model, letter.error.kind, str(len(letter.faults)))
    out.print(table if letters else "No job is set aside.")


@app.command()
def show(job_id: _Id, *, as_json: Json = False) -> None:
    """Show one job: what happened under each of its attempts, and its body."""
    letter = _letters(read_settings()).find(job_id)
    if letter is None:
        raise _unknown([job_id])
    if as_json:
        print_json(letter.model_dump(mode="json"))
        return
    faults = Table("attempt", "when", "worker", "what", "company")
    for fault in letter.faults:
        company = "" if fault.company is None else f"{fault.company} when it died"
        faults.add_row(str(fault.attempt), _local(fault.at), fault.worker, escape(fault.message), company)
    body = json.dumps(letter.body, ensure_ascii=False, indent=2)
    out.print(Group(escape(letter.error.message), faults, escape(body)), highlight=False)


@app.command()
def retry(job_ids: _Ids, *, as_json: Json = False) -> None:
    """Run jobs again under their ids, with their attempts at nought; a deadline that has passed is left out."""
    settings = read_settings()
    letters = _letters(settings)
    with closing(JobClient(settings.redis.url)) as client:
        done = [job_id for job_id in job_ids if letters.retry(job_id, partial(_submit, client, job_id))]
    _tell("retried", job_ids, done, as_json=as_json)


@app.command()
def drop(job_ids: _Ids, *, as_json: Json = False) -> None:
    """Forget jobs; their outcomes stay what they are, until they expire."""
    letters = _letters(read_settings())
    _tell("dropped", job_ids, [job_id for job_id in job_ids if letters.drop(job_id)], as_json=as_json)


def _letters(settings: Settings) -> DeadLetters:
    return DeadLetters(reach_redis(settings))


def _submit(client: JobClient, job_id: str, body: dict[str, Any]) -> None:
    request = JobRequest.parse(body)
    if request.deadline is not None and request.deadline <= utc_now():
        request = request.model_copy(update={"deadline": None})
    client.submit(request, job_id=job_id)


def _tell(what: str, asked: Sequence[str], done: Sequence[str], *, as_json: bool) -> None:
    """Say what became of the jobs; one that is not there is an error, after the others."""
    if as_json:
        print_json({what: done})
    else:
        for job_id in done:
            out.print(f"{what} {job_id}", highlight=False, markup=False)
    if unknown := [job_id for job_id in asked if job_id not in done]:
        raise _unknown(unknown)


def _unknown(job_ids: Sequence[str]) -> InvalidRequest:
    return InvalidRequest(f"Not set aside, or not any more: {', '.join(job_ids)}. See `shiftworker dead list`.")


def _local(moment: datetime) -> str:
    return f"{moment.astimezone():%Y-%m-%d %H:%M:%S}"
