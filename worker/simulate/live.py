"""
Plans what waits now: switches and finish, before anything runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from common.errors import BadSetting
from worker.simulate.costs import ModelCosts
from worker.simulate.forecast import jobs_of
from worker.simulate.policies import shiftworker
from worker.simulate.run import Start, simulate
from worker.state.backlog import Backlog


@dataclass(frozen=True, kw_only=True)
class LivePlan:
    """What one worker alone would do with the jobs that wait, if no more came."""

    jobs: Mapping[str, int]  # by model
    switches: int
    finish_s: Mapping[str, float]  # by model: seconds from now until its last job has ended

    def as_dict(self) -> dict[str, Any]:
        """Give it as one JSON object, rounded to a millisecond."""
        return {
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
    now: float,
    ready: str | None = None,
    ready_since: float = 0.0,
    max_wait_s: float,
    min_turn_s: float,
) -> LivePlan:
    """
    Run the decision forward from *now* (Unix seconds), with jobs that are all of their lane's mean size; *ready* is
    loaded, since *ready_since*.

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
    here = ready if ready in costs else None
    start = Start(at_s=now, ready=here, since_s=ready_since, started=frozenset({here} if here else ()))
    decide = shiftworker(costs, max_wait_s=max_wait_s, min_turn_s=min_turn_s)
    run = simulate(jobs, costs, decide, max_wait_s=max_wait_s, starts=(start,))
    finish = dict.fromkeys(waiting, 0.0)
    for job, end in zip(jobs, run.ends, strict=True):
        finish[job.model] = max(finish[job.model], end - now)
    return LivePlan(
        jobs={model: found.count for model, found in waiting.items()}, switches=len(run.turns), finish_s=finish
    )
