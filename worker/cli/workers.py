"""
`shiftworker status`, `switch`, `drain`: how the workers are, and what they are told to do.
"""

from __future__ import annotations

import sys
import time
from contextlib import closing
from typing import Annotated, Any

import typer
from celery.exceptions import TimeoutError as CeleryTimeout
from rich.markup import escape

from common import keys
from common.celery_app import create_app
from common.client import JobClient
from common.errors import BadSetting, ShiftworkerError, Unavailable, UnknownModel
from common.fleet import read_alive, read_offers, read_statuses, read_unserved
from common.schemas import HardwareStatus
from worker import show
from worker.cli.console import Json, err, out, print_json, reach_redis, read_settings

_LOOK_EVERY_S = 0.1  # whether a draining worker is gone

app = typer.Typer()


@app.command()
def status(
    job: Annotated[str | None, typer.Argument(help="A job's id: how it is, and when it will have ended.")] = None,
    *,
    as_json: Json = False,
) -> None:
    """Show how every worker is: cards, residents, queues, last switches, alerts. Or how one job is."""
    settings = read_settings()
    if job is not None:
        with closing(JobClient(settings.redis.url)) as producer:
            view = producer.status(job)
        if as_json:
            print_json(view.model_dump(mode="json"))
        else:
            out.print(show.job_lines(view), highlight=False)
        return
    client = reach_redis(settings)
    statuses = read_statuses(client)
    away = sorted({offer.worker for offer in read_offers(client)} - {found.worker for found in statuses})
    unserved = read_unserved(client, {model for found in statuses for model in found.backlog})
    unrouted = sum(client.llen(name) for name in keys.lists_of(keys.SUBMIT_QUEUE))
    set_aside = client.zcard(keys.DEAD)
    if as_json:
        workers = [found.model_dump(mode="json") for found in statuses]
        waiting = {"unserved": unserved, "waiting_for_router": unrouted, "set_aside": set_aside}
        print_json({"workers": workers, "away": away, **waiting})
        return
    for found in statuses:
        out.print(show.status_panel(found))
    if not statuses:
        out.print("No worker is alive. Start one with `shiftworker worker` or `shiftworker up`.")
    if away:
        out.print(f"Away: {', '.join(away)}", style="yellow")
    for model, count in unserved.items():
        out.print(f"No worker that is alive serves {escape(model)}: {count} jobs wait", style="yellow")
    if set_aside:
        out.print(f"{set_aside} jobs are set aside; `shiftworker dead list` says why", style="yellow")
    out.print(f"{unrouted} jobs wait for the router")


@app.command()
def switch(
    model: Annotated[str, typer.Argument(help="Catalogue id or alias.")],
    worker: Annotated[str, typer.Option(help="Which worker; unset = the only one.")] = "",
    *,
    force: Annotated[bool, typer.Option(help="Skip the checks of temperature, power and free memory.")] = False,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for the end of the switch.")] = 600,
) -> None:
    """Make a model ready now. The worker switches again when its queues ask for it."""
    settings = read_settings()
    client = reach_redis(settings)
    name, model_id = _find_model(model, worker, read_statuses(client), client)
    celery = create_app(settings)
    pending = celery.send_task(
        keys.SWITCH_TASK, kwargs={"model": model_id, "force": force}, queue=keys.control_queue(name)
    )
    with out.status(f"{name}: switching to {model_id}"):
        try:
            record = pending.get(timeout=timeout)
        except CeleryTimeout:
            raise ShiftworkerError(
                f"{name} has not ended the switch to {model_id} after {timeout:.0f} s; "
                "`shiftworker status` shows its stage."
            ) from None
    out.print(f"{record['outcome']} after {record['seconds']:.1f} s: {record['reason']}", highlight=False)
    sys.exit(0 if record["outcome"] == "ready" else 1)


def _find_model(model: str, worker: str, alive: tuple[HardwareStatus, ...], client: Any) -> tuple[str, str]:
    names = [found.worker for found in alive if worker in ("", found.worker)]
    if len(names) != 1:
        known = ", ".join(found.worker for found in alive) or "none"
        raise BadSetting(f"--worker must name one of the workers that are alive: {known}.")
    for offer in read_offers(client):
        for offered in offer.models:
            if offer.worker == names[0] and model in (offered.id, *offered.aliases):
                return names[0], offered.id
    raise UnknownModel(f"Worker {names[0]} does not offer {model!r}; `shiftworker models` there says why.")


@app.command()
def drain(
    worker: Annotated[str | None, typer.Argument(help="Which worker; unset = all of this host.")] = None,
    *,
    wait: Annotated[bool, typer.Option("--wait", help="Wait until they are gone.")] = False,
    timeout: Annotated[float, typer.Option(help="Seconds to wait.")] = 600,
) -> None:
    """
    Let workers go, for an upgrade: they take no more jobs, give those that run their grace, the rest back, and end.

    Exit codes: 0 = they are leaving (with --wait: gone), 1 = not all are gone in time, 69 = none has heard it.
    """
    from worker.delivery.drain import ask_to_drain  # noqa: PLC0415 - it brings half of Celery's worker

    settings = read_settings()
    client = reach_redis(settings)
    leaving = ask_to_drain(create_app(settings), worker)
    if not leaving:
        raise Unavailable(
            f"No worker {f'named {worker}' if worker else 'of this host'} has answered; alive are: "
            f"{', '.join(found.worker for found in read_statuses(client)) or 'none'}. One that is cut off from Redis "
            "or paused hears nothing: send it SIGTERM."
        )
    out.print(f"Draining: {', '.join(leaving)}", highlight=False)
    if not wait:
        return
    until = time.monotonic() + timeout
    while (there := read_alive(client, leaving)) and time.monotonic() < until:
        time.sleep(_LOOK_EVERY_S)
    if there:
        err.print(f"Not gone after {timeout:g} s: {', '.join(sorted(there))}", highlight=False)
        sys.exit(1)
    out.print("Gone")
