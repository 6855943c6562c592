"""
`shiftworker plan`: what a policy would do with a trace, or the workers with what waits now.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from common.bounds import Bounds
from common.errors import BadSetting
from common.fleet import read_offers, read_statuses, read_unserved
from common.settings import Settings
from worker.cli.console import Json, out, print_json, reach_redis, read_settings

app = typer.Typer()


@app.command()
def plan(
    trace: Annotated[Path | None, typer.Argument(help="Jobs, a JSON object on each line.")] = None,
    costs: Annotated[
        Path | None, typer.Option(help="What loads and jobs of each model take; --live goes by what was measured.")
    ] = None,
    policy: Annotated[str, typer.Option(help="shiftworker, fifo, collate or round-robin")] = "shiftworker",
    workers: Annotated[int, typer.Option(min=1, help="Workers on the one queue.")] = 1,
    max_wait: Annotated[float | None, typer.Option(min=0, help="Seconds; unset = SWITCH_MAX_WAIT_S.")] = None,
    *,
    live: Annotated[bool, typer.Option("--live", help="Instead of a trace: what waits now.")] = False,
    turns: Annotated[bool, typer.Option("--turns", help="Show each turn, and why it was taken.")] = False,
    as_json: Json = False,
) -> None:
    """
    Run a trace on virtual time, with the worker's own decisions: switches, waits, finish.

    With --live, what waits in Redis now, on the workers that are alive: before anything runs.
    """
    from worker.simulate.plan import plan_file  # noqa: PLC0415 - a producer has no use for it
    from worker.simulate.policies import PolicyName, policy_named  # noqa: PLC0415 - as above
    from worker.simulate.show import show_plan  # noqa: PLC0415 - as above

    settings = read_settings()
    bounds = Bounds.parse(settings.switch.max_wait_s if max_wait is None else max_wait, settings.switch.max_waits)
    if live == (trace is not None):
        raise BadSetting("shiftworker plan needs a TRACE, or --live for what waits now: one of the two.")
    if trace is None:
        if policy_named(policy) is not PolicyName.SHIFTWORKER or workers != 1:
            raise BadSetting("--live plans for the workers that are alive, as they decide: no --policy, no --workers.")
        _plan_live(settings, costs, bounds, turns=turns, as_json=as_json)
        return
    if costs is None:
        raise BadSetting("A TRACE needs --costs: a TOML table for each of its models. docs/scheduling.md has one.")
    found = plan_file(
        trace,
        costs,
        policy=policy_named(policy),
        workers=workers,
        bounds=bounds,
        min_turn_s=settings.switch.min_turn_s,
    )
    if as_json:
        print_json(found.as_dict(turns=turns))
    else:
        out.print(show_plan(found, turns=turns))


def _plan_live(settings: Settings, costs_file: Path | None, bounds: Bounds, *, turns: bool, as_json: bool) -> None:
    """Print what the workers would do with the jobs that wait."""
    from worker.jobs.paces import pace_of  # noqa: PLC0415 - as above
    from worker.scheduling.redis_queues import RedisQueues  # noqa: PLC0415 - as above
    from worker.simulate.costs import read_costs  # noqa: PLC0415 - as above
    from worker.simulate.live import know_models, plan_backlog  # noqa: PLC0415 - as above
    from worker.simulate.show import show_live_plan  # noqa: PLC0415 - as above
    from worker.telemetry.redis_paces import RedisPaces  # noqa: PLC0415 - as above
    from worker.telemetry.redis_switch_times import RedisSwitchTimes  # noqa: PLC0415 - as above

    said = read_costs(costs_file) if costs_file else {}
    client = reach_redis(settings)
    alive = read_statuses(client)
    offers = {offer.worker: frozenset(model.id for model in offer.models) for offer in read_offers(client)}
    models = sorted({*said, *read_unserved(client, said), *(model for offered in offers.values() for model in offered)})
    queues = RedisQueues(client, models, bounds=bounds)
    queues.backlog()  # what a stock producer has pushed joins the backlog: the next reading has it
    paces = sorted(RedisPaces(client).read(), key=lambda found: found.at)  # of several workers' the newest counts
    planned = plan_backlog(
        queues.backlog(),
        know_models(
            {found.model: pace_of(found) for found in paces},
            [time for worker in sorted(offers) for time in RedisSwitchTimes(client, worker).read()],
            said,
        ),
        workers=alive,
        offers=offers,
        now=time.time(),
        max_wait_s=bounds.usual_s,
        min_turn_s=settings.switch.min_turn_s,
    )
    if as_json:
        print_json(planned.as_dict(turns=turns))
    else:
        out.print(show_live_plan(planned, turns=turns))
