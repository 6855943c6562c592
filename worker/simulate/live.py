"""
Plans what waits now: switches and finish, before anything runs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from common.errors import BadSetting
from common.schemas import HardwareStatus, SwitchTime, WorkerState
from worker.residency.expect import expect_switch_s
from worker.simulate.costs import ModelCosts
from worker.simulate.forecast import jobs_of
from worker.simulate.plan import turn_as_dict
from worker.simulate.policies import pace_of, shiftworker
from worker.simulate.price import Priced, price_backlog
from worker.simulate.run import Start, TurnTaken, simulate
from worker.state.backlog import Backlog, Waiting
from worker.state.pace import Pace
from worker.state.residency import Level, Residency

_COLDEST_FIRST = (Level.COLD, Level.SPARE, Level.ASLEEP_2, Level.ASLEEP_1)
_STARTED = (Level.READY, Level.ASLEEP_1, Level.ASLEEP_2)


@dataclass(frozen=True, kw_only=True)
class LivePlan:
    """What the workers would do with the jobs that wait, if no more came."""

    jobs: Mapping[str, int]  # by model
    workers: int
    switches: int  # the ones under way too
    finish_s: Mapping[str, float]  # by model: seconds from now until its last job has ended
    turns: tuple[TurnTaken, ...] = ()  # those to come; moments are seconds from now
    unserved: Mapping[str, int] = field(default_factory=dict)  # by model: jobs that no worker that is alive could run

    def as_dict(self, *, turns: bool = False) -> dict[str, Any]:
        """Give it as one JSON object, rounded to a millisecond; the turns only where they are asked for."""
        found = {
            "workers": self.workers,
            "switches": self.switches,
            "finish_s": round(max(self.finish_s.values(), default=0.0), 3),
            "models": {
                model: {"jobs": count, "finish_s": round(self.finish_s[model], 3)} for model, count in self.jobs.items()
            },
            "unserved": dict(self.unserved),
        }
        return {**found, "turns": [turn_as_dict(turn) for turn in self.turns]} if turns else found


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What is known of the models: by what the workers have measured, unless somebody says otherwise."""

    paces: Mapping[str, Pace]
    load_s: Mapping[str, float]  # of the first start on a worker
    wake_s: Mapping[str, float]  # of every later one


def know_models(paces: Mapping[str, Pace], times: Iterable[SwitchTime], said: Mapping[str, ModelCosts]) -> Measured:
    """
    Put together what is known of each model.

    1. Do the costs that were *said* name it?   They are its rates and its switches; how long its answers are is still
                                                what was measured, where its jobs do not say.
    2. Was it measured?                         Its newest *paces*, and the *times* of its switches: from the files for
                                                its first start, from the warmest level for the later ones.
    3. Otherwise                                Nothing is known of it.
    """
    known = sorted(times, key=lambda time: time.at)  # of several workers' the newest counts
    load_s: dict[str, float] = {}
    wake_s: dict[str, float] = {}
    for model in {time.to_model for time in known}:
        by_level = [expect_switch_s(known, None, model, level=level) for level in _COLDEST_FIRST]
        measured = [seconds for seconds in by_level if seconds is not None]
        load_s[model], wake_s[model] = measured[0], measured[-1]
    of_said = {
        model: replace(pace_of(cost), output_tokens=paces[model].output_tokens if model in paces else None)
        for model, cost in said.items()
    }
    return Measured(
        paces={**paces, **of_said},
        load_s={**load_s, **{model: cost.load_s for model, cost in said.items()}},
        wake_s={**wake_s, **{model: cost.wake_s for model, cost in said.items()}},
    )


def plan_backlog(
    backlog: Backlog,
    measured: Measured,
    *,
    workers: Sequence[HardwareStatus],
    offers: Mapping[str, Collection[str]],
    now: float,
    max_wait_s: float,
    min_turn_s: float,
) -> LivePlan:
    """
    Run the decision forward from *now* (Unix seconds), jobs all of their lane's mean size.

    It runs on the *workers* that take jobs, each with the models that it *offers* (by its name); if there are none, on
    one that has nothing loaded and serves everything.

    Raises
    ------
    BadSetting
        Jobs wait for a model of which it is not known what they or its switch take.
    """
    working = [worker for worker in workers if worker.state is not WorkerState.DRAINING]
    served = {model for worker in working for model in offers.get(worker.worker, ())}
    waiting = {model: found for model, found in sorted(backlog.by_model.items()) if found.count}
    unserved = {model: found.count for model, found in waiting.items() if working and model not in served}
    waiting = {model: found for model, found in waiting.items() if model not in unserved}
    _check_known(waiting, measured)
    priced = _price(Backlog(by_model=waiting), measured)
    jobs = [
        job._replace(arrival_s=job.arrival_s - now, deadline_s=job.deadline_s and job.deadline_s - now)
        for model, found in priced.backlog.by_model.items()
        for lane in found.by_class
        for job in jobs_of(lane, model, now=now, sizes=[1 / lane.count] * lane.count)
    ]
    jobs.sort(key=lambda job: job.arrival_s)
    starts = [start for worker in working for start in _starts(worker, priced, offers.get(worker.worker, ()), now=now)]
    starts = starts or [Start()]
    decide = shiftworker(priced.costs, max_wait_s=max_wait_s, min_turn_s=min_turn_s)
    run = simulate(jobs, priced.costs, decide, max_wait_s=max_wait_s, starts=starts)
    finish = dict.fromkeys(waiting, 0.0)
    for job, end in zip(jobs, run.ends, strict=True):
        finish[job.model] = max(finish[job.model], end)
    return LivePlan(
        jobs={model: found.count for model, found in waiting.items()},
        workers=len(working) or 1,
        switches=sum(start.target is not None for start in starts) + len(run.turns),
        finish_s=finish,
        turns=tuple(run.turns),
        unserved=unserved,
    )


def _check_known(waiting: Mapping[str, Waiting], measured: Measured) -> None:
    """Refuse jobs whose time nobody knows: a plan without them would be too short."""
    for model, found in waiting.items():
        if model not in measured.load_s or model not in measured.paces:
            raise BadSetting(
                f"Jobs wait for {model}, and no worker has measured it yet. "
                "Give it a table in a file of costs, --costs; docs/scheduling.md says how."
            )
        if silent := sum(lane.count for lane in found.by_class if measured.paces[model].work_s(lane) is None):
            raise BadSetting(
                f"Of {silent} jobs for {model} nobody knows how long their answers may be, and none was measured yet. "
                "Let a worker answer some, or send them with max_tokens."
            )


def _price(backlog: Backlog, measured: Measured) -> Priced:
    """What waits, in tokens, with what a first start and a later one take."""
    nothing_loaded = Residency(capacity=0, max_residents=1, residents=(), switch_s=measured.load_s)
    priced = price_backlog(backlog, measured.paces, nothing_loaded)
    costs = {model: cost.model_copy(update={"wake_s": measured.wake_s[model]}) for model, cost in priced.costs.items()}
    return replace(priced, costs=costs)


def _starts(worker: HardwareStatus, priced: Priced, offered: Collection[str], *, now: float) -> Iterator[Start]:
    """
    How a worker is, in seconds from now; models that are ready side by side count as a worker each.

    A switch under way has just begun, and jobs in flight end evenly within the time of a usual one.
    """
    serves = frozenset(offered)
    ready = [r for r in worker.residents if r.level == Level.READY and r.model in priced.costs]
    started = frozenset(r.model for r in worker.residents if r.model in priced.costs and Level(r.level) in _STARTED)
    if (target := worker.switching_to) is not None and target in priced.costs:
        costs = priced.costs[target]
        in_s = costs.wake_s if target in started else costs.load_s
        yield Start(name=worker.worker, target=target, target_at_s=in_s, started=started, serves=serves)
        return
    for found in ready:
        usual_s = priced.usual_s.get(found.model) or _mean_s(priced, found.model)
        ends_s = tuple(usual_s * (n + 1) / found.in_flight for n in range(found.in_flight))
        yield Start(
            name=worker.worker,
            ready=found.model,
            since_s=found.since.timestamp() - now,
            ends_s=ends_s,
            started=started,
            serves=serves,
        )
    if not ready:
        yield Start(name=worker.worker, started=started, serves=serves)


def _mean_s(priced: Priced, model: str) -> float:
    """Seconds of a job that waits for the model, on average; 0 if none does."""
    waiting, pace = priced.backlog.by_model[model], pace_of(priced.costs[model])
    return max((pace.one_s(lane) or 0.0 for lane in waiting.by_class), default=0.0)
