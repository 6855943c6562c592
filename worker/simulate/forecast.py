"""
When will the waiting jobs end? The worker's own decisions are run forward from what is seen now, many times.
"""

from __future__ import annotations

import math
import random
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from worker.simulate.costs import ModelCosts
from worker.simulate.policies import pace_of, shiftworker
from worker.simulate.queue import Queue
from worker.simulate.run import Run, Start, simulate
from worker.simulate.trace import TracedJob
from worker.state.backlog import Backlog, Lane

_RUNS = 30
_MOST = 250  # jobs in a run; of more, several are played as one
_ERROR = 0.05  # how far a measured pace or switch is off for a whole run: a normal distribution's standard deviation
_RANGE = 0.1, 0.9
_SPREAD = 0.5  # of the times of single jobs, where nobody has measured it
_STEP = 1.4  # from one place in the line that is told to the next


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
    usual_s: Mapping[str, float] = field(default_factory=dict)  # that one job takes among others, by model
    workers: Sequence[Start] = (Start(),)
    traffic: Mapping[str, Traffic] = field(default_factory=dict)
    pace_error: Mapping[str, float] = field(default_factory=dict)  # how far it is off for a whole run; 0.05 unless told
    spread: Mapping[str, float] = field(default_factory=dict)  # of single jobs' times: standard deviation by mean


@dataclass(frozen=True, kw_only=True)
class Finish:
    """When a job will have ended that has *ahead* jobs of its model before it: 8 of 10 times between low and high."""

    ahead: int
    low_at: float  # Unix seconds, as all of these
    middle_at: float
    high_at: float
    switches: int  # that it waits for in the middle case, the one under way too


def forecast_backlog(snapshot: Snapshot) -> Mapping[str, tuple[Finish, ...]]:
    """
    Say of each model when its jobs will end: the first in line, the last, and some between.

    Of a model that nobody waits for, when the next job would if it came now. The same snapshot gives the same answer:
    the dice have a seed.
    """
    waiting = {model: snapshot.backlog.count(model) for model in snapshot.costs}
    bundle = max(1, math.ceil(sum(waiting.values()) / _MOST))
    runs = [_play(snapshot, bundle, random.Random(number)) for number in range(_RUNS)]  # noqa: S311
    return {
        model: tuple(_finish(ahead, [run.end_of(model, ahead, count) for run in runs]) for ahead in _told(count))
        for model, count in waiting.items()
    }


def _told(count: int) -> list[int]:
    """The places in a line of *count* jobs that are told: close together at its head."""
    places = {0, max(0, count - 1)}
    place = 1.0
    while place < count - 1:
        places.add(int(place))
        place = max(place + 1, place * _STEP)
    return sorted(places)


def _finish(ahead: int, found: list[tuple[float, int]]) -> Finish:
    found.sort()
    low, high = (found[round(share * (_RUNS - 1))][0] for share in _RANGE)
    middle_at, switches = found[_RUNS // 2]
    return Finish(ahead=ahead, low_at=low, middle_at=middle_at, high_at=high, switches=switches)


@dataclass(frozen=True, kw_only=True)
class _Played:
    """One run, and where each job stands in it."""

    run: Run
    line: Mapping[str, Sequence[int]]  # by model: the jobs that wait now, in their order
    costs: Mapping[str, ModelCosts]  # of this run
    one_s: Mapping[str, float]  # a usual job of this run
    begun: int  # switches under way at its beginning
    starts: Sequence[Start]

    def end_of(self, model: str, ahead: int, count: int) -> tuple[float, int]:
        """When the job ends that has *ahead* of *count* before it, and after how many switches."""
        line = self.line.get(model)
        if not line:
            return self._if_it_came(model)
        place = ahead * len(line) / count
        job = line[int(place)]
        start, end = self.run.starts[job], self.run.ends[job]
        if len(line) < count:  # a bundle: each of its jobs takes its own time ...
            if self.costs[model].max_num_seqs == 1:  # ... and they start one after the other
                start += (place - int(place)) * (end - start)
            end = start + self.one_s[model]
        return end, self._switches(start)

    def _switches(self, until: float) -> int:
        return self.begun + bisect_right(sorted(turn.ready_s for turn in self.run.turns), until)

    def _if_it_came(self, model: str) -> tuple[float, int]:
        """When a job of a model would end that nobody waits for: the last in line, unless its model is ready."""
        now = self.starts[0].at_s
        if here := [start for start in self.starts if model in (start.ready, start.target)]:
            return min(start.target_at_s or now for start in here) + self.one_s[model], self.begun
        busy = sorted(max(self.run.ends[job] for job in line) for line in self.line.values() if line)
        busy += sorted(max(start.ends_s, default=now) for start in self.starts)[: max(0, len(self.starts) - len(busy))]
        free_at = max(now, max(busy) if len(self.starts) == 1 else min(busy))
        return free_at + self.costs[model].load_s + self.one_s[model], self._switches(free_at) + 1


def _play(snapshot: Snapshot, bundle: int, dice: random.Random) -> _Played:
    """Run it once, with other dice for each job, pace and switch."""
    usual = _coarse(snapshot, bundle) if bundle > 1 else snapshot.costs
    spread = {model: snapshot.spread.get(model, _SPREAD) for model in usual}
    of_bundle = {m: spread[m] / (1 if cost.max_num_seqs > 1 else math.sqrt(bundle)) for m, cost in usual.items()}
    jobs = [
        job
        for model, waiting in snapshot.backlog.by_model.items()
        for lane in waiting.by_class
        for job in jobs_of(lane, model, now=snapshot.now, sizes=_sizes(lane.count, bundle, of_bundle[model], dice))
    ]
    jobs.sort(key=lambda job: job.arrival_s)
    queues = {model: Queue(jobs, bytearray(len(jobs)), snapshot.max_wait_s, by_arrival=False) for model in usual}
    for number, job in enumerate(jobs):
        queues[job.model].put(number)
    line = {model: [queue.take(snapshot.now) for _ in range(len(queue))] for model, queue in queues.items() if queue}
    costs = {model: _unsure(cost, snapshot.pace_error.get(model, _ERROR), dice) for model, cost in usual.items()}
    starts = [_unsure_start(start, snapshot.now, dice) for start in snapshot.workers]
    coming = _coming(snapshot, usual, bundle, dice)
    run = simulate(
        [*jobs, *coming],
        costs,
        shiftworker(usual, max_wait_s=snapshot.max_wait_s, min_turn_s=snapshot.min_turn_s),
        max_wait_s=snapshot.max_wait_s,
        starts=starts,
        first=len(jobs),
    )
    begun = sum(start.target is not None for start in starts)
    one_s = {model: one_job_s(snapshot, model) * _noise(spread[model], dice) for model in usual}
    return _Played(run=run, line=line, costs=costs, one_s=one_s, begun=begun, starts=starts)


def jobs_of(lane: Lane, model: str, *, now: float, sizes: Sequence[float]) -> list[TracedJob]:
    """
    Make the jobs of a lane up from its sums, evenly old; *sizes* are their shares of its tokens.

    The earliest deadline is that of the first: of the others' it is not known whether there are any.
    """
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
            deadline_s=None if n else lane.deadline_at,
            max_wait_s=lane.max_wait_s,
        )
        for n, size in enumerate(sizes)
    ]


def _coarse(snapshot: Snapshot, bundle: int) -> Mapping[str, ModelCosts]:
    """
    The costs for bundles, which go through all places together as fast as their jobs would.

    Where there are places for two bundles, the jobs of one run side by side. Else they run one after the other, and
    what a turn loses at its end, while its places fall empty one by one, is a part of each switch.
    """
    places = {model: max(1, cost.max_num_seqs // bundle) for model, cost in snapshot.costs.items()}
    waits = [model for model in snapshot.costs if snapshot.backlog.count(model)]
    lost_s = sum(_emptying_s(snapshot, model) for model in waits if places[model] == 1) / len(waits)
    found = {}
    for model, cost in snapshot.costs.items():
        if places[model] > 1:
            wider = cost.max_num_seqs / places[model]
            found[model] = cost.model_copy(
                update={"max_num_seqs": places[model], "decode_tokens_per_s": cost.decode_tokens_per_s * wider}
            )
            continue
        lanes, pace = _lanes(snapshot, model), pace_of(cost)
        one_by_one = sum(replace(pace, at_once=1).work_s(lane) or 0.0 for lane in lanes)
        together = sum(pace.work_s(lane) or 0.0 for lane in lanes)
        faster = one_by_one / together if together else float(cost.max_num_seqs)
        found[model] = cost.model_copy(
            update={
                "max_num_seqs": 1,
                "prefill_tokens_per_s": cost.prefill_tokens_per_s * faster,
                "decode_tokens_per_s": cost.decode_tokens_per_s * faster,
                "load_s": cost.load_s + lost_s,
                "wake_s": cost.wake_s + lost_s,
            }
        )
    return found


def _emptying_s(snapshot: Snapshot, model: str) -> float:
    """
    How much longer the last of the jobs in flight takes than the others, on average.

    With jobs of equal size half of one, for they are halfway; with sizes of an exponential distribution the largest of
    k is ln k + 0.6 of them, and the mean is 1.
    """
    spread, at_once = snapshot.spread.get(model, _SPREAD), snapshot.costs[model].max_num_seqs
    return one_job_s(snapshot, model) * (0.5 + spread * max(0.0, math.log(at_once) - 0.9)) if at_once > 1 else 0.0


def one_job_s(snapshot: Snapshot, model: str) -> float:
    """Seconds that one job of the model takes: of those that wait, else of a usual one."""
    found = [pace_of(snapshot.costs[model]).one_s(lane) for lane in _lanes(snapshot, model)]
    return max((one_s for one_s in found if one_s is not None), default=snapshot.usual_s.get(model, 0.0))


def _lanes(snapshot: Snapshot, model: str) -> tuple[Lane, ...]:
    waiting = snapshot.backlog.by_model.get(model)
    return waiting.by_class if waiting else ()


def _sizes(count: int, bundle: int, spread: float, dice: random.Random) -> list[float]:
    """Roll the shares of *count* jobs, played as bundles."""
    bundles = math.ceil(count / bundle)
    return [_noise(spread, dice) / bundles for _ in range(bundles)]


def _coming(snapshot: Snapshot, costs: Mapping[str, ModelCosts], bundle: int, dice: random.Random) -> list[TracedJob]:
    """Roll jobs that come while those of now are served; in bundles, where those are."""
    lasts_s = sum(cost.load_s for cost in costs.values())
    for model, waiting in snapshot.backlog.by_model.items():
        lasts_s += sum(pace_of(costs[model]).work_s(lane) or 0.0 for lane in waiting.by_class)
    until = snapshot.now + 2 * lasts_s
    jobs: list[TracedJob] = []
    for model, traffic in sorted(snapshot.traffic.items()):
        at = snapshot.now
        while traffic.per_s and len(jobs) < _MOST and (at := at + dice.expovariate(traffic.per_s / bundle)) < until:
            size = bundle * _noise(snapshot.spread.get(model, _SPREAD) / math.sqrt(bundle), dice)
            tokens = round(traffic.prompt_tokens * size), round(traffic.output_tokens * size)
            jobs.append(TracedJob("", at, model, *tokens))
    return sorted(jobs, key=lambda job: job.arrival_s)


def _unsure(cost: ModelCosts, error: float, dice: random.Random) -> ModelCosts:
    faster, slower = max(0.5, dice.gauss(1, error)), max(0.5, dice.gauss(1, _ERROR))
    return cost.model_copy(
        update={
            "prefill_tokens_per_s": cost.prefill_tokens_per_s * faster,
            "decode_tokens_per_s": cost.decode_tokens_per_s * faster,
            "load_s": cost.load_s * slower,
            "wake_s": cost.wake_s * slower,
        }
    )


def _unsure_start(start: Start, now: float, dice: random.Random) -> Start:
    ends_s = tuple(now + (ends - now) * dice.uniform(0.5, 1.5) for ends in start.ends_s)
    if start.target_at_s is None:
        return replace(start, ends_s=ends_s)
    return replace(start, ends_s=ends_s, target_at_s=now + (start.target_at_s - now) * dice.uniform(0.9, 1.1))


def _noise(spread: float, dice: random.Random) -> float:
    """Roll a factor with mean 1 and this standard deviation, never below 0."""
    return dice.gammavariate(1 / spread**2, spread**2) if spread else 1.0
