"""
What a run came to: makespan, switches, waits, broken promises.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any

from worker.simulate.costs import ModelCosts
from worker.simulate.run import Run


@dataclass(frozen=True, kw_only=True)
class Report:
    """The figures of a run; a wait is from a job's arrival to the start of its prompt. Seconds."""

    jobs: int
    makespan_s: float  # from the first arrival to the last end
    switches: int  # first loads too
    mean_wait_s: float
    p50_wait_s: float
    p95_wait_s: float
    max_wait_s: float
    bound_violations: int  # waits longer than the bound, the jobs in flight then, and one switch
    deadline_misses: int  # jobs that ended after their deadline

    def as_dict(self) -> dict[str, Any]:
        """Give the figures as JSON has them, rounded to a millisecond."""
        return {key: round(value, 3) for key, value in asdict(self).items()}


def summarize_run(run: Run, costs: Mapping[str, ModelCosts], *, max_wait_s: float) -> Report:
    """Sum up *run*; *max_wait_s* is the bound of jobs that have none of their own."""
    waits = sorted(start - job.arrival_s for job, start in zip(run.jobs, run.starts, strict=True))
    return Report(
        jobs=len(waits),
        makespan_s=max(run.ends) - run.jobs[0].arrival_s,
        switches=len(run.turns),
        mean_wait_s=math.fsum(waits) / len(waits),
        p50_wait_s=_quantile(waits, 0.5),
        p95_wait_s=_quantile(waits, 0.95),
        max_wait_s=waits[-1],
        bound_violations=len(find_violations(run, costs, max_wait_s=max_wait_s)),
        deadline_misses=sum(
            job.deadline_s is not None and end > job.deadline_s for job, end in zip(run.jobs, run.ends, strict=True)
        ),
    )


def find_violations(run: Run, costs: Mapping[str, ModelCosts], *, max_wait_s: float) -> list[int]:
    """
    Find the jobs whose wait breaks the promise: the bound, then the jobs in flight, then one switch.

    In flight are those that run at the moment when the bound of the job is over.
    """
    bounds = [max_wait_s if job.max_wait_s is None else job.max_wait_s for job in run.jobs]
    late = [n for n, job in enumerate(run.jobs) if run.starts[n] - job.arrival_s > bounds[n]]
    if not late:
        return []
    order = sorted(range(len(run.jobs)), key=run.starts.__getitem__)
    starts = [run.starts[n] for n in order]
    ends = list(accumulate((run.ends[n] for n in order), max))  # the latest end among those that have started
    first_ready: dict[str, float] = {}
    for turn in run.turns:
        first_ready.setdefault(turn.model, turn.ready_s)

    def allowed_until(n: int) -> float:
        job = run.jobs[n]
        over_at = job.arrival_s + bounds[n]
        running = bisect_right(starts, over_at)
        cost = costs[job.model]
        switch_s = cost.wake_s if first_ready[job.model] <= over_at else max(cost.load_s, cost.wake_s)
        return max(over_at, ends[running - 1] if running else over_at) + switch_s

    return [n for n in late if run.starts[n] > allowed_until(n) + 1e-9]


def _quantile(ordered: list[float], share: float) -> float:
    """Give the least value that *share* of them do not exceed."""
    return ordered[math.ceil(share * len(ordered)) - 1]
