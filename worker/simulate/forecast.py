"""
When will a waiting job end? The worker's own decisions are run forward from what is seen now, many times.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from worker.simulate.costs import ModelCosts
from worker.simulate.machine import rank
from worker.simulate.policies import shiftworker
from worker.simulate.run import Start, simulate
from worker.simulate.trace import TracedJob
from worker.state.backlog import Backlog, Lane

_RUNS = 30
_MOST = 500  # jobs in a run; of more, several are played as one
_PACE_ERROR = 0.05  # how far a measured pace or switch is off for a whole run; of a normal distribution
_RANGE = 0.1, 0.9


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Jobs of one model that are expected to come."""

    per_s: float
    prompt_tokens: float  # of a usual one
    output_tokens: float


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """What a worker sees at a moment, and what it has measured."""

    now: float  # Unix seconds
    backlog: Backlog  # with tokens; what is unknown counts as nothing
    costs: Mapping[str, ModelCosts]
    max_wait_s: float
    min_turn_s: float
    ready: str | None = None
    ready_since: float = 0.0  # Unix seconds
    target: str | None = None  # of a switch that is asked for, or under way ...
    target_in_s: float | None = None  # ... seconds it is expected to take on; None = it waits for the jobs in flight
    in_flight_s: tuple[float, ...] = ()  # seconds that each job in flight is expected to take on
    started: frozenset[str] = frozenset()  # models that wake instead of being loaded
    traffic: Mapping[str, Traffic] = field(default_factory=dict)
    spread: float = 0.5  # of the time of single jobs: standard deviation by mean


@dataclass(frozen=True, kw_only=True)
class Finish:
    """When a job will have ended: in 8 of 10 cases between the first and the last; Unix seconds."""

    low_at: float
    middle_at: float
    high_at: float
    switches: int  # that it waits for in the middle case, the one under way too


def forecast_finish(snapshot: Snapshot, model_id: str, *, ahead: int) -> Finish | None:
    """
    Say when the job will end that has *ahead* jobs of its own model before it; None if fewer wait.

    The same snapshot gives the same answer: the dice have a seed.
    """
    if ahead >= snapshot.backlog.count(model_id):
        return None
    bundle = max(1, math.ceil(sum(w.count for w in snapshot.backlog.by_model.values()) / _MOST))
    found = sorted(_play(snapshot, model_id, ahead // bundle, bundle, random.Random(run)) for run in range(_RUNS))  # noqa: S311
    low, high = (found[round(share * (_RUNS - 1))][0] for share in _RANGE)
    middle_at, switches = found[_RUNS // 2]
    return Finish(low_at=low, middle_at=middle_at, high_at=high, switches=switches)


def _play(snapshot: Snapshot, model_id: str, ahead: int, bundle: int, dice: random.Random) -> tuple[float, int]:
    """Run it once, with other dice for each job, pace and switch; when the job ends, and the switches until then."""
    jobs = [
        job
        for model, waiting in snapshot.backlog.by_model.items()
        for lane in waiting.by_class
        for job in jobs_of(lane, model, now=snapshot.now, sizes=_sizes(lane.count, bundle, snapshot.spread, dice))
    ]
    work_s = sum(_alone_s(job, snapshot.costs[job.model]) for job in jobs)
    jobs += _coming(snapshot, snapshot.now + work_s, dice)
    jobs.sort(key=lambda job: job.arrival_s)
    line = [n for n, job in enumerate(jobs) if job.model == model_id and job.arrival_s <= snapshot.now]
    line.sort(key=lambda n: rank(jobs[n], n, snapshot.max_wait_s))
    target = line[min(ahead, len(line) - 1)]
    start = Start(
        at_s=snapshot.now,
        ready=snapshot.ready,
        since_s=snapshot.ready_since,
        ends_s=tuple(snapshot.now + seconds * dice.uniform(0.5, 1.5) for seconds in snapshot.in_flight_s),
        started=snapshot.started,
        target=snapshot.target,
        target_at_s=None
        if snapshot.target_in_s is None
        else snapshot.now + snapshot.target_in_s * dice.uniform(0.9, 1.1),
    )
    costs = {model: _unsure(cost, dice) for model, cost in snapshot.costs.items()}
    decide = shiftworker(snapshot.costs, max_wait_s=snapshot.max_wait_s, min_turn_s=snapshot.min_turn_s)
    run = simulate(jobs, costs, decide, max_wait_s=snapshot.max_wait_s, start=start, only=target)
    return run.ends[target], len(run.turns) + (snapshot.target is not None)


def jobs_of(lane: Lane, model: str, *, now: float, sizes: Sequence[float]) -> list[TracedJob]:
    """Make the jobs of a lane up from its sums, evenly old; *sizes* are their shares of its tokens."""
    oldest = now if lane.oldest_at is None else lane.oldest_at
    newest = oldest if lane.newest_at is None else lane.newest_at
    return [
        TracedJob(
            id="",
            arrival_s=min(now, oldest + (newest - oldest) * n / max(1, len(sizes) - 1)),
            model=model,
            prompt_tokens=round((lane.prompt_tokens or 0) * size),
            output_tokens=round((lane.output_tokens or 0) * size),
            priority=lane.priority,
        )
        for n, size in enumerate(sizes)
    ]


def _sizes(count: int, bundle: int, spread: float, dice: random.Random) -> list[float]:
    """Roll the shares of *count* jobs, played as bundles."""
    bundles = math.ceil(count / bundle)
    return [_noise(spread / math.sqrt(bundle), dice) / bundles for _ in range(bundles)]


def _coming(snapshot: Snapshot, until: float, dice: random.Random) -> list[TracedJob]:
    jobs = []
    for model, traffic in sorted(snapshot.traffic.items()):
        at = snapshot.now
        while traffic.per_s and (at := at + dice.expovariate(traffic.per_s)) < until:
            size = _noise(snapshot.spread, dice)
            tokens = round(traffic.prompt_tokens * size), round(traffic.output_tokens * size)
            jobs.append(TracedJob("", at, model, *tokens))
    return jobs


def _unsure(cost: ModelCosts, dice: random.Random) -> ModelCosts:
    faster, slower = (max(0.5, dice.gauss(1, _PACE_ERROR)) for _ in range(2))
    return cost.model_copy(
        update={
            "prefill_tokens_per_s": cost.prefill_tokens_per_s * faster,
            "decode_tokens_per_s": cost.decode_tokens_per_s * faster,
            "load_s": cost.load_s * slower,
            "wake_s": cost.wake_s * slower,
        }
    )


def _alone_s(job: TracedJob, cost: ModelCosts) -> float:
    return job.prompt_tokens / cost.prefill_tokens_per_s + job.output_tokens / cost.decode_tokens_per_s + cost.load_s


def _noise(spread: float, dice: random.Random) -> float:
    """Roll a factor with mean 1 and this standard deviation, never below 0."""
    return dice.gammavariate(1 / spread**2, spread**2) if spread else 1.0
