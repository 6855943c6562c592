"""
Plans what waits now: switches and finish, before anything runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from common.errors import BadSetting
from common.schemas import HardwareStatus
from worker.simulate.costs import ModelCosts
from worker.simulate.forecast import jobs_of
from worker.simulate.policies import shiftworker
from worker.simulate.run import Start, simulate
from worker.state.backlog import Backlog
from worker.state.residency import Level


@dataclass(frozen=True, kw_only=True)
class LivePlan:
    """What the workers would do with the jobs that wait, if no more came."""

    jobs: Mapping[str, int]  # by model
    workers: int
    switches: int
    finish_s: Mapping[str, float]  # by model: seconds from now until its last job has ended

    def as_dict(self) -> dict[str, Any]:
        """Give it as one JSON object, rounded to a millisecond."""
        return {
            "workers": self.workers,
            "switches": self.switches,
            "finish_s": round(max(self.finish_s.values(), default=0.0), 3),
            "models": {
                model: {"jobs": count, "finish_s": round(self.finish_s[model], 3)} for model, count in self.jobs.items()
            },
        }


def plan_backlog(
    backlog: Backlog,
    costs: Mapping[str, ModelCosts],
    *,
    workers: Sequence[HardwareStatus],
    now: float,
    max_wait_s: float,
    min_turn_s: float,
) -> LivePlan:
    """
    Run the decision forward from *now* (Unix seconds) on the *workers* that are alive, or on one if none is; jobs are
    all of their lane's mean size.

    Raises
    ------
    BadSetting
        Jobs wait for a model whose costs are not given, or whose tokens nobody has counted.
    """
    waiting = {model: found for model, found in sorted(backlog.by_model.items()) if found.count}
    if unpriced := [model for model in waiting if model not in costs]:
        raise BadSetting(f"Jobs wait for {', '.join(unpriced)}, and the costs have no table for it. Add one.")
    for model, found in waiting.items():
        counted = sum(lane.count for lane in found.lanes if None not in (lane.prompt_tokens, lane.output_tokens))
        if counted < found.count:
            raise BadSetting(
                f"The tokens of {found.count - counted} jobs for {model} are not counted: no plan without."
            )
    jobs = [
        job
        for model, found in waiting.items()
        for lane in found.lanes
        for job in jobs_of(lane, model, now=now, sizes=[1 / lane.count] * lane.count)
    ]
    jobs.sort(key=lambda job: job.arrival_s)
    starts = [_start(worker, costs, now=now) for worker in workers] or [Start(at_s=now)]
    decide = shiftworker(costs, max_wait_s=max_wait_s, min_turn_s=min_turn_s)
    run = simulate(jobs, costs, decide, max_wait_s=max_wait_s, starts=starts)
    finish = dict.fromkeys(waiting, 0.0)
    for job, end in zip(jobs, run.ends, strict=True):
        finish[job.model] = max(finish[job.model], end - now)
    under_way = sum(start.target is not None for start in starts)
    return LivePlan(
        jobs={model: found.count for model, found in waiting.items()},
        workers=len(starts),
        switches=under_way + len(run.turns),
        finish_s=finish,
    )


def _start(worker: HardwareStatus, costs: Mapping[str, ModelCosts], *, now: float) -> Start:
    """How a worker is; a model that the costs do not name is not there, and a switch under way has just begun."""
    ready = next((r for r in worker.residents if r.level == Level.READY and r.model in costs), None)
    started = frozenset(r.model for r in worker.residents if Level(r.level).asleep or r is ready)
    if (target := worker.switching_to) is not None and target in costs:
        in_s = costs[target].wake_s if target in started else costs[target].load_s
        return Start(at_s=now, target=target, target_at_s=now + in_s, started=started)
    if ready is None:
        return Start(at_s=now, started=started)
    return Start(at_s=now, ready=ready.model, since_s=ready.since.timestamp(), started=started)
