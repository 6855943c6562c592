"""
The physics of a simulated worker: one model ready at a time, its places, its switches.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush

from worker.simulate.costs import ModelCosts
from worker.simulate.trace import TracedJob
from worker.state.backlog import Lane, Waiting

_EMPTY = Waiting(count=0, oldest_at=None)


@dataclass(slots=True)
class _Sum:
    """One lane while it grows and shrinks."""

    priority: int
    tenant: str
    count: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    arrived: deque[int] = field(default_factory=deque)  # in order of arrival; those that run are dropped late
    deadlines: list[tuple[float, int]] = field(default_factory=list)  # a heap; likewise


class Queue:
    """The jobs that wait for one model, in their order, and their sums; a job is its number in the trace."""

    def __init__(self, jobs: Sequence[TracedJob], waits: bytearray, max_wait_s: float, *, by_arrival: bool) -> None:
        self._jobs = jobs
        self._waits = waits  # by job: 1 while it waits; shared by all queues
        self._max_wait_s = max_wait_s
        self._by_arrival = by_arrival
        self._order: list[tuple[int, float, int]] = []
        self._lanes: dict[tuple[int, str], _Sum] = {}
        self._reading: Waiting | None = _EMPTY
        self._reading_until = math.inf

    def __len__(self) -> int:
        return len(self._order)

    def put(self, number: int) -> bool:
        """Add a job; True if it is the first of its lane, or has a deadline: something to look at."""
        job = self._jobs[number]
        self._waits[number] = 1
        self._reading = None
        heappush(self._order, (0, 0.0, number) if self._by_arrival else rank(job, number, self._max_wait_s))
        lane = self._lanes.get((job.priority, job.tenant))
        if lane is None:
            lane = self._lanes[job.priority, job.tenant] = _Sum(job.priority, job.tenant)
        lane.count += 1
        lane.prompt_tokens += job.prompt_tokens
        lane.output_tokens += job.output_tokens
        lane.arrived.append(number)
        if job.deadline_s is not None:
            heappush(lane.deadlines, (job.deadline_s, number))
        return lane.count == 1 or job.deadline_s is not None

    @property
    def first(self) -> int:
        """The job that is served next."""
        return self._order[0][2]

    @property
    def oldest(self) -> int:
        """The job that arrived first."""
        return min(self._oldest(lane) for lane in self._lanes.values() if lane.count)

    def take(self) -> int:
        """Take the job that is served next."""
        number = heappop(self._order)[2]
        job = self._jobs[number]
        self._waits[number] = 0
        self._reading = None
        lane = self._lanes[job.priority, job.tenant]
        lane.count -= 1
        lane.prompt_tokens -= job.prompt_tokens
        lane.output_tokens -= job.output_tokens
        return number

    def read(self, now: float) -> Waiting:
        """Read the sums; once between two changes, unless a deadline passes."""
        if self._reading is None or now >= self._reading_until:
            lanes = tuple(self._read(lane, now) for lane in self._lanes.values() if lane.count)
            oldest = min((lane.oldest_at for lane in lanes if lane.oldest_at is not None), default=None)
            deadlines = (lane.deadline_at for lane in lanes if lane.deadline_at is not None)
            self._reading_until = min(deadlines, default=math.inf)
            self._reading = Waiting(count=len(self._order), oldest_at=oldest, lanes=lanes)
        return self._reading

    def _read(self, lane: _Sum, now: float) -> Lane:
        waits = self._waits
        while lane.deadlines and (not waits[lane.deadlines[0][1]] or lane.deadlines[0][0] <= now):
            heappop(lane.deadlines)
        return Lane(
            count=lane.count,
            oldest_at=self._jobs[self._oldest(lane)].arrival_s,
            newest_at=self._jobs[lane.arrived[-1]].arrival_s,
            priority=lane.priority,
            tenant=lane.tenant,
            prompt_tokens=lane.prompt_tokens,
            output_tokens=lane.output_tokens,
            deadline_at=lane.deadlines[0][0] if lane.deadlines else None,
        )

    def _oldest(self, lane: _Sum) -> int:
        while not self._waits[lane.arrived[0]]:
            lane.arrived.popleft()
        return lane.arrived[0]


def rank(job: TracedJob, number: int, max_wait_s: float) -> tuple[int, float, int]:
    """Place a job among those of its model: by class, then by the moment it is due, then by arrival."""
    due = job.arrival_s + max_wait_s
    return (job.priority, due if job.deadline_s is None else min(due, job.deadline_s), number)


class Machine:
    """One worker: its engine's places, the prompt that is read, the switch under way."""

    def __init__(self, name: str, costs: Mapping[str, ModelCosts]) -> None:
        self.name = name
        self._costs = costs
        self.switch_s = {model: cost.load_s for model, cost in costs.items()}  # what the next switch to each takes
        self.ready: str | None = None
        self.since = 0.0
        self.target: str | None = None  # of the switch that is asked for or under way
        self.loading = False  # jobs in flight have ended, the switch itself runs
        self.running = 0
        self.reading_until = 0.0  # a prompt is read; the next one waits for it

    def begin_with(self, started: Collection[str], ready: str | None, since: float, *, running: int) -> None:
        """Begin in the middle: some models have been loaded, one may be ready and have jobs in flight."""
        self.switch_s |= {model: self._costs[model].wake_s for model in started}
        self.ready, self.since, self.running = ready, since, running

    def has_room(self) -> bool:
        """Is a place free?"""
        return self.ready is not None and self.running < self._costs[self.ready].max_num_seqs

    def begin(self, now: float) -> float:
        """Begin the switch that was asked for; returns when it ends."""
        assert self.target is not None  # noqa: S101
        self.loading = True
        ends = now + self.switch_s[self.target]
        self.switch_s[self.target] = self._costs[self.target].wake_s
        self.ready = None
        return ends

    def end(self, now: float) -> None:
        """The switch is done."""
        self.ready, self.target, self.loading = self.target, None, False
        self.since = self.reading_until = now

    def start(self, job: TracedJob, now: float) -> float:
        """Start a job of the ready model; returns when it ends."""
        costs = self._costs[job.model]
        self.running += 1
        self.reading_until = now + job.prompt_tokens / costs.prefill_tokens_per_s
        return self.reading_until + job.output_tokens / costs.decode_tokens_per_s
