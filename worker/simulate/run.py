"""
Runs a trace on virtual time: events in order, and a policy that is asked where its answer can change.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush

from worker.scheduling.overtake import MOST, find_long_s
from worker.scheduling.pick import Turn
from worker.simulate.costs import ModelCosts
from worker.simulate.machine import Machine
from worker.simulate.queue import Queue
from worker.simulate.trace import TracedJob

_END, _READY, _LOOK = range(3)  # kinds of events: a job ends, a switch is done, look at the queues again


@dataclass(slots=True)
class TurnTaken:
    """One turn of one model on one worker; moments are seconds on the trace's clock."""

    worker: str
    model: str
    asked_s: float
    ready_s: float
    reason: str
    jobs: int = 0


@dataclass(kw_only=True)
class Run:
    """What became of a trace; lists go by the number of the job."""

    jobs: Sequence[TracedJob]
    starts: list[float]
    ends: list[float]
    turns: list[TurnTaken] = field(default_factory=list)
    decisions: int = 0


@dataclass(frozen=True, kw_only=True)
class Sight:
    """What a policy sees."""

    now: float  # seconds on the trace's clock
    machine: Machine  # whose turn is decided
    queues: Mapping[str, Queue]  # by model; those of all workers together
    others: Sequence[Machine]  # the other workers
    jobs: Sequence[TracedJob]

    def arrival_s(self, number: int) -> float:
        """When the job of this number came."""
        return self.jobs[number].arrival_s


Policy = Callable[[Sight], Turn]


@dataclass(frozen=True, kw_only=True)
class Start:
    """How things are on one worker when a run begins; unless it is told, nothing has happened yet."""

    name: str | None = None  # of the worker; None = by its number
    at_s: float = 0.0  # jobs that came before wait since then
    ready: str | None = None  # the model that is ready ...
    since_s: float = 0.0  # ... since when ...
    ends_s: tuple[float, ...] = ()  # ... and when the jobs in flight end
    started: frozenset[str] = frozenset()  # models that need no first load any more
    serves: frozenset[str] | None = None  # the models that it can serve; None = all
    target: str | None = None  # of a switch that is asked for, or under way ...
    target_at_s: float | None = None  # ... when it will be ready; None = it waits for the jobs in flight


_NOTHING_YET = Start()


def simulate(
    jobs: Sequence[TracedJob],
    costs: Mapping[str, ModelCosts],
    policy: Policy,
    *,
    workers: int = 1,
    max_wait_s: float,
    line: bool = False,
    overtaking: bool = True,
    starts: Sequence[Start] = (_NOTHING_YET,),
    first: int | None = None,
) -> Run:
    """
    Run *jobs*, sorted by arrival, to their end, or until each of the *first* jobs has its place.

    One model is ready at a time on each worker; a switch waits for the jobs in flight, then takes load_s (the first
    time there) or wake_s. A job starts when a place is free and no other prompt is read. With *line*, jobs start in
    the order of their arrival, whatever their model: FIFO. With *overtaking*, long ones overtake at the end of a turn
    (find_long_s). *starts*: how the first workers are at the beginning.
    """
    simulation = _Simulation(
        jobs, costs, policy, max(workers, len(starts)), max_wait_s, line=line, overtaking=overtaking
    )
    simulation.begin(starts)
    return simulation.run(first)


class _Simulation:
    def __init__(
        self,
        jobs: Sequence[TracedJob],
        costs: Mapping[str, ModelCosts],
        policy: Policy,
        workers: int,
        max_wait_s: float,
        *,
        line: bool,
        overtaking: bool,
    ) -> None:
        self._jobs = jobs
        self._policy = policy
        self._line = line
        self._overtaking = overtaking and not line
        waits = bytearray(len(jobs))
        self._queues = {
            model: Queue(jobs, waits, max_wait_s, by_arrival=line, costs=cost) for model, cost in costs.items()
        }
        self._machines = [Machine(f"worker{n + 1}", costs) for n in range(workers)]
        self._turns: dict[int, TurnTaken] = {}  # of each machine, the newest
        self._look_at = [0.0] * workers  # the moment of the newest _LOOK asked for
        self._look: set[int] = set()  # machines whose policy must be asked
        self._events: list[tuple[float, int, int]] = []  # moment, kind, machine
        self._run = Run(jobs=jobs, starts=[0.0] * len(jobs), ends=[0.0] * len(jobs))
        self._waits = waits
        self._waiting = 0
        self._arrived = self._oldest = 0  # of all that have arrived, the first that waits
        self._begins_s = 0.0
        self._first = 0  # the run ends when as many jobs ...
        self._left = 1  # ... have none of them left without a place; it never does while _first is 0

    def begin(self, starts: Sequence[Start]) -> None:
        self._begins_s = starts[0].at_s
        for which, start in enumerate(starts):
            self._begin_one(which, start)

    def _begin_one(self, which: int, start: Start) -> None:
        machine = self._machines[which]
        machine.begin_with(start.started, start.ready, start.since_s, ends_s=start.ends_s)
        machine.name, machine.serves = start.name or machine.name, start.serves
        if start.ready is not None:
            self._turns[which] = TurnTaken(machine.name, start.ready, start.since_s, start.since_s, "it was ready")
        for ends_s in start.ends_s:
            heappush(self._events, (max(ends_s, start.at_s), _END, which))
        if start.target is not None:
            machine.target, machine.loading = start.target, start.target_at_s is not None
            self._turns[which] = TurnTaken(machine.name, start.target, start.at_s, start.at_s, "it was asked for")
            soon = (start.at_s, _LOOK) if start.target_at_s is None else (start.target_at_s, _READY)
            heappush(self._events, (*soon, which))

    def run(self, first: int | None) -> Run:
        jobs, events = self._jobs, self._events
        if first is not None:
            self._first = self._left = first
        arrived, total = 0, len(jobs)
        comes = max(jobs[0].arrival_s, self._begins_s) if jobs else math.inf
        while (arrived < total or events) and self._left:
            now = min(events[0][0], comes) if events else comes
            touched: set[int] = set()
            while events and events[0][0] == now:
                _, kind, which = heappop(events)
                self._happen(kind, which, now)
                touched.add(which)
            while comes == now:
                self._arrive(arrived, touched)
                arrived += 1
                comes = max(jobs[arrived].arrival_s, self._begins_s) if arrived < total else math.inf
            for which in touched:
                self._advance(which, now)
        return self._run

    def _happen(self, kind: int, which: int, now: float) -> None:
        machine = self._machines[which]
        if kind == _END:
            machine.finish(now)
        elif kind == _READY:
            machine.end(now)
            self._turns[which].ready_s = now
            self._admit(which, now)  # as a worker does, whose engine is ready before it decides again
            self._look.add(which)
        elif self._look_at[which] == now:
            self._look.add(which)

    def _arrive(self, number: int, touched: set[int]) -> None:
        model = self._jobs[number].model
        news = self._queues[model].put(number)
        self._waiting += 1
        self._arrived = number + 1
        for which, machine in enumerate(self._machines):
            if machine.ready == model:
                touched.add(which)
            elif news or machine.ready is None or not self._queues[machine.ready]:
                self._look.add(which)
                touched.add(which)

    def _advance(self, which: int, now: float) -> None:
        machine = self._machines[which]
        while machine.target is None:
            if which in self._look:
                self._look.discard(which)
                if self._waiting:  # otherwise no policy has anything to say
                    self._decide(which, now)
                if machine.target is not None:
                    break
            if not self._admit(which, now):
                break
        if machine.target is not None and not machine.loading and not machine.running:
            heappush(self._events, (machine.begin(now), _READY, which))

    def _admit(self, which: int, now: float) -> bool:
        """Start jobs of the ready model; True if the policy must be asked again."""
        machine = self._machines[which]
        if machine.ready is None:
            return False
        queue = self._queues[machine.ready]
        turn = self._turns[which]
        while queue and machine.has_room():
            if machine.reading_until > now:
                heappush(self._events, (machine.reading_until, _LOOK, which))
                return False
            number = queue.take(now, long_s=self._long_s(queue, machine, now) if self._overtaking else None)
            self._waiting -= 1
            self._run.starts[number] = now
            ends = self._run.ends[number] = machine.start(self._jobs[number], now)
            turn.jobs += 1
            self._left -= number < self._first
            heappush(self._events, (ends, _END, which))
            if self._line or not queue:
                self._look.add(which)
                return self._waiting > 0
        if not queue and self._waiting:
            self._look.add(which)  # nothing to start, and others wait: every end may change the answer
        return False

    def _long_s(self, queue: Queue, machine: Machine, now: float) -> float | None:
        """From which length on a job overtakes others, as all who serve this model see it."""
        while not self._waits[self._oldest]:
            self._oldest += 1
        newest_s = self._jobs[self._arrived - 1].arrival_s
        came_s, quiet_s = newest_s - self._jobs[self._oldest].arrival_s, now - newest_s
        if quiet_s < came_s or len(queue) > MOST:  # as nearly always: the answer is known, and the rest takes long
            return None
        served = {model for other in self._machines for model in (other.ready, other.target) if model is not None}
        mates = [other for other in self._machines if other.ready == machine.ready]
        reading_s, whole_s = queue.alone_s()
        return find_long_s(
            waiting=len(queue),
            elsewhere=self._waiting - sum(len(self._queues[model]) for model in served),
            places=sum(mate.places for mate in mates),
            reading_s=reading_s / len(mates),
            whole_s=whole_s + sum(mate.left_s(now) for mate in mates),
            came_s=came_s,
            quiet_s=quiet_s,
        )

    def _decide(self, which: int, now: float) -> None:
        machine = self._machines[which]
        others = [other for other in self._machines if other is not machine]
        turn = self._policy(Sight(now=now, machine=machine, queues=self._queues, others=others, jobs=self._jobs))
        self._run.decisions += 1
        if turn.until is not None and turn.until > now and turn.model_id == machine.ready:
            self._look_at[which] = turn.until
            heappush(self._events, (turn.until, _LOOK, which))
        if turn.model_id is None or turn.model_id == machine.ready:
            return
        machine.target = turn.model_id
        taken = TurnTaken(machine.name, turn.model_id, now, now, turn.reason)
        self._turns[which] = taken
        self._run.turns.append(taken)
        for other, _ in enumerate(others):  # what this worker leaves, or takes up, may change what the others do
            which_other = other + (other >= which)
            self._look_at[which_other] = now
            heappush(self._events, (now, _LOOK, which_other))
