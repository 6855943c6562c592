"""
Plans a trace: reads it, runs it with a policy, says what came of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.bounds import Bounds
from common.keys import PRIORITY_STEPS
from worker.scheduling.foresee import class_of
from worker.simulate.costs import read_costs
from worker.simulate.policies import PolicyName, make_policy
from worker.simulate.report import Report, summarize_run
from worker.simulate.run import Run, TurnTaken, simulate
from worker.simulate.trace import TracedJob, read_trace


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a policy would do with a trace."""

    policy: PolicyName
    workers: int
    report: Report
    turns: tuple[TurnTaken, ...]

    def as_dict(self, *, turns: bool) -> dict[str, Any]:
        """Give it as one JSON object; the turns only where they are asked for."""
        found = {"policy": self.policy.value, "workers": self.workers, **self.report.as_dict()}
        return {**found, "turns": [turn_as_dict(turn) for turn in self.turns]} if turns else found


def plan_file(
    trace: Path, costs_file: Path, *, policy: PolicyName, workers: int, bounds: Bounds, min_turn_s: float
) -> Plan:
    """
    Run the trace of a file with the costs of another; *bounds* are those of tenants and classes.

    Raises
    ------
    InvalidRequest
        The trace cannot be read; the message names line and field.
    BadSetting
        The costs cannot be read; likewise.
    """
    costs = read_costs(costs_file)
    jobs = read_trace(trace, costs)
    if bounds.by:
        jobs = [_with_bound(job, bounds) for job in jobs]
    decide = make_policy(policy, costs, max_wait_s=bounds.usual_s, min_turn_s=min_turn_s)
    run: Run = simulate(
        jobs,
        costs,
        decide,
        workers=workers,
        max_wait_s=bounds.usual_s,
        line=policy is PolicyName.FIFO,
        overtaking=policy is PolicyName.SHIFTWORKER,
    )
    report = summarize_run(run, costs, max_wait_s=bounds.usual_s)
    return Plan(policy=policy, workers=workers, report=report, turns=tuple(run.turns))


def _with_bound(job: TracedJob, bounds: Bounds) -> TracedJob:
    bound_s = bounds.of(job.tenant, PRIORITY_STEPS[class_of(job.priority)])
    return job if bound_s == bounds.usual_s else job._replace(max_wait_s=bound_s)


def turn_as_dict(turn: TurnTaken) -> dict[str, Any]:
    """Give a turn as JSON has it, rounded to a millisecond."""
    return {
        "worker": turn.worker,
        "model": turn.model,
        "asked_s": round(turn.asked_s, 3),
        "ready_s": round(turn.ready_s, 3),
        "jobs": turn.jobs,
        "reason": turn.reason,
    }
