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
from common.fleet import read_offers, read_statuses
from common.settings import Settings
from worker.cli.console import Json, out, print_json, reach_redis, read_settings

app = typer.Typer()


@app.command()
def plan(
    costs: Annotated[Path, typer.Option(help="What loads and jobs of each model take, a TOML table for each.")],
    trace: Annotated[Path | None, typer.Argument(help="Jobs, a JSON object on each line.")] = None,
    policy: Annotated[str, typer.Option(help="shiftworker, fifo, collate or round-robin")] = "shiftworker",
    workers: Annotated[int, typer.Option(min=1, help="Workers on the one queue.")] = 1,
    max_wait: Annotated[float | None, typer.Option(min=0, help="Seconds; unset = SWITCH_MAX_WAIT_S.")] = None,
    *,
    live: Annotated[bool, typer.Option("--live", help="Instead of a trace: what waits now.")] = False,
    turns: Annotated[bool, typer.Option("--turns", help="Show each turn, and why it was taken.")] = False,
    as_json: Json = False,
) -> None:
    """Run a recorded or made-up trace on virtual time, with the worker's own decisions: switches, waits, finish."""
    from worker.simulate.plan import plan_file  # noqa: PLC0415 - a producer has no use for it
    from worker.simulate.policies import policy_named  # noqa: PLC0415 - as above
    from worker.simulate.show import show_plan  # noqa: PLC0415 - as above

    settings = read_settings()
    bounds = Bounds.parse(settings.switch.max_wait_s if max_wait is None else max_wait, settings.switch.max_waits)
    if live == (trace is not None):
        raise BadSetting("shiftworker plan needs a TRACE, or --live for what waits now: one of the two.")
    if trace is None:
        _plan_live(settings, costs, bounds, as_json=as_json)
        return
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


def _plan_live(settings: Settings, costs_file: Path, bounds: Bounds, *, as_json: bool) -> None:
    """Print what the worker would do with the jobs that wait."""
    from worker.scheduling.redis_queues import RedisQueues  # noqa: PLC0415 - as above
    from worker.simulate.costs import read_costs  # noqa: PLC0415 - as above
    from worker.simulate.live import plan_backlog  # noqa: PLC0415 - as above

    costs = read_costs(costs_file)
    client = reach_redis(settings)
    found = read_statuses(client)
    offered = {model.id for offer in read_offers(client) for model in offer.models}
    planned = plan_backlog(
        RedisQueues(client, sorted(offered | costs.keys()), bounds=bounds).backlog(),
        costs,
        now=time.time(),
        workers=found,
        max_wait_s=bounds.usual_s,
        min_turn_s=settings.switch.min_turn_s,
    )
    if as_json:
        print_json(planned.as_dict())
        return
    for model, jobs in planned.jobs.items():
        out.print(f"{model}: {jobs} jobs, the last ends in {planned.finish_s[model]:,.0f} s", highlight=False)
    out.print(f"{planned.switches} switches on {planned.workers} workers", highlight=False)
