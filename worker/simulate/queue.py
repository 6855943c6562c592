"""
The jobs that wait for one simulated model: in the order of the real backlog, and summed up as it is read.

The order is that of common/backlog_scripts.py; a test holds the two side by side.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush

from common.keys import PRIORITY_STEPS
from worker.scheduling.foresee import class_of
from worker.simulate.costs import ModelCosts
from worker.simulate.trace import TracedJob
from worker.state.backlog import Lane, Waiting

_EMPTY = Waiting(count=0, oldest_at=None)

_Place = tuple[int, float, int]  # class, tag or deadline, number: who is served first within a level


@dataclass(slots=True)
class _Lane:
    """The jobs of one class that have the same bound, summed up."""

    priority: int  # the step of the class
    max_wait_s: float | None  # as the jobs say
    count: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    arrived: deque[int] = field(default_factory=deque)  # in order of arrival; those that run are dropped late
    deadlines: list[tuple[float, int]] = field(default_factory=list)  # a heap; likewise


@dataclass(slots=True)
class _Class:
    """The jobs of one class, and who has had how much of it."""

    count: int = 0
    lanes: dict[float | None, _Lane] = field(default_factory=dict)  # by bound
    virtual_time: float = 0.0  # the tag of the job served last
    share_ends: dict[str, float] = field(default_factory=dict)  # by tenant

    def next_tag(self, job: TracedJob) -> float:
        """Give a new job its tag; its tenant's share ends behind it."""
        tag = max(self.virtual_time, self.share_ends.get(job.tenant, 0.0))
        self.share_ends[job.tenant] = tag + max(1, job.prompt_tokens + job.output_tokens)
        return tag


class Queue:
    """
    The jobs that wait for one model; a job is its number in the trace.

    Parameters
    ----------
    jobs
        The trace, in order of arrival.
    waits
        By job: 1 while it waits; shared by all queues.
    max_wait_s
        The bound of jobs that say none of their own: who has waited for so long comes first.
    by_arrival
        Serve in the order of arrival, and nothing else.
    costs
        What its jobs take; None = nobody asks.
    """

    def __init__(
        self,
        jobs: Sequence[TracedJob],
        waits: bytearray,
        max_wait_s: float,
        *,
        by_arrival: bool,
        costs: ModelCosts | None = None,
    ) -> None:
        self._jobs = jobs
        self._waits = waits
        self._max_wait_s = max_wait_s
        self._by_arrival = by_arrival
        self._costs = costs
        self._count = 0
        self._binding: list[_Place] = []  # heaps; whoever runs is dropped late
        self._overdue: list[_Place] = []
        self._usual: list[_Place] = []
        self._will_be_overdue: deque[_Place] = deque()  # in order of arrival
        self._will_break_own: list[tuple[float, _Place]] = []  # jobs with a bound of their own: a heap, by the moment
        self._will_bind: list[tuple[float, _Place]] = []  # likewise
        self._classes = {step: _Class() for step in PRIORITY_STEPS}
        self._reading: Waiting | None = _EMPTY
        self._reading_until = math.inf

    def __len__(self) -> int:
        return self._count

    def put(self, number: int) -> bool:
        """Add a job; True if it presses more than those of its class that wait: something to look at."""
        job = self._jobs[number]
        self._waits[number] = 1
        self._reading = None
        self._count += 1
        job_class = class_of(job.priority)
        step = PRIORITY_STEPS[job_class]
        mates = self._classes[step]
        mates.count += 1
        lane = mates.lanes.get(job.max_wait_s)
        if lane is None:
            lane = mates.lanes[job.max_wait_s] = _Lane(step, job.max_wait_s)
        lane.count += 1
        lane.prompt_tokens += job.prompt_tokens
        lane.output_tokens += job.output_tokens
        lane.arrived.append(number)
        if self._by_arrival:
            heappush(self._usual, (0, 0.0, number))
            return lane.count == 1
        place = (job_class, mates.next_tag(job), number)
        heappush(self._usual, place)
        if job.max_wait_s is None:
            self._will_be_overdue.append(place)
        else:
            heappush(self._will_break_own, (job.arrival_s + job.max_wait_s, place))
        if job.deadline_s is None:
            return lane.count == 1
        binds_at = (job.arrival_s + job.deadline_s) / 2
        heappush(self._will_bind, (binds_at, (job_class, job.deadline_s, number)))
        heappush(lane.deadlines, (job.deadline_s, number))
        return lane.deadlines[0][1] == number or lane.count == 1

    @property
    def oldest(self) -> int:
        """The job that arrived first."""
        return min(self._oldest(lane) for lane in self._lanes())

    def alone_s(self) -> tuple[float, float]:
        """Seconds to read all prompts that wait, and of all jobs one after the other."""
        assert self._costs is not None  # noqa: S101
        waiting = self._lanes()
        return self._costs.alone_s(
            sum(lane.prompt_tokens for lane in waiting), sum(lane.output_tokens for lane in waiting)
        )

    def take(self, now: float, *, long_s: float | None = None) -> int:
        """Take the job that is served next: of its level and class the longest, if it takes *long_s* or more."""
        if not self._by_arrival:
            self._promote(now)
        level = next(level for level in (self._binding, self._overdue, self._usual) if self._clean(level, now))
        if long_s is None or level is self._binding or (number := self._overtaker(level, long_s)) is None:
            _, tag, number = heappop(level)
        else:
            tag = 0.0  # the class's time stays as it is
        job = self._jobs[number]
        self._waits[number] = 0
        self._reading = None
        self._count -= 1
        mates = self._classes[PRIORITY_STEPS[class_of(job.priority)]]
        mates.count -= 1
        lane = mates.lanes[job.max_wait_s]
        lane.count -= 1
        lane.prompt_tokens -= job.prompt_tokens
        lane.output_tokens -= job.output_tokens
        if not mates.count:
            mates.virtual_time, mates.share_ends = 0.0, {}
        elif level is not self._binding:
            mates.virtual_time = max(mates.virtual_time, tag)
        return number

    def _lanes(self) -> list[_Lane]:
        """Those in which jobs wait, the most urgent class first."""
        return [lane for mates in self._classes.values() if mates.count for lane in mates.lanes.values() if lane.count]

    def _overtaker(self, level: list[_Place], long_s: float) -> int | None:
        """The longest of the jobs that are level with the first, and of its class; None = it is not so long."""
        first = level[0][0]
        mates = [number for job_class, _, number in level if job_class == first and self._waits[number]]
        longest = max(mates, key=self._takes_s)
        return longest if self._takes_s(longest) >= long_s else None

    def _takes_s(self, number: int) -> float:
        assert self._costs is not None  # noqa: S101
        job = self._jobs[number]
        return self._costs.alone_s(job.prompt_tokens, job.output_tokens)[1]

    def _promote(self, now: float) -> None:
        """Give each job the level that it has at *now*."""
        jobs, waits = self._jobs, self._waits
        soon = self._will_be_overdue
        while soon and (not waits[soon[0][2]] or jobs[soon[0][2]].arrival_s + self._max_wait_s <= now):
            place = soon.popleft()
            if waits[place[2]]:
                heappush(self._overdue, place)
        while self._will_break_own and self._will_break_own[0][0] <= now:
            heappush(self._overdue, heappop(self._will_break_own)[1])
        while self._will_bind and self._will_bind[0][0] <= now:
            heappush(self._binding, heappop(self._will_bind)[1])

    def _clean(self, level: list[_Place], now: float) -> bool:
        """Drop those at the head that run; True if somebody is left."""
        while level and (not self._waits[level[0][2]] or (level is self._binding and level[0][1] <= now)):
            heappop(level)
        return bool(level)

    def read(self, now: float) -> Waiting:
        """Read the sums by class and bound, tenants together; once between two changes, unless a deadline passes."""
        if self._reading is None or now >= self._reading_until:
            lanes = tuple(self._read(lane, now) for lane in self._lanes())
            oldest = min((lane.oldest_at for lane in lanes if lane.oldest_at is not None), default=None)
            deadlines = (lane.deadline_at for lane in lanes if lane.deadline_at is not None)
            self._reading_until = min(deadlines, default=math.inf)
            self._reading = Waiting(count=self._count, oldest_at=oldest, lanes=lanes)
        return self._reading

    def _read(self, lane: _Lane, now: float) -> Lane:
        waits = self._waits
        while lane.deadlines and (not waits[lane.deadlines[0][1]] or lane.deadlines[0][0] <= now):
            heappop(lane.deadlines)
        return Lane(
            count=lane.count,
            oldest_at=self._jobs[self._oldest(lane)].arrival_s,
            newest_at=self._jobs[lane.arrived[-1]].arrival_s,
            priority=lane.priority,
            prompt_tokens=lane.prompt_tokens,
            output_tokens=lane.output_tokens,
            deadline_at=lane.deadlines[0][0] if lane.deadlines else None,
            max_wait_s=lane.max_wait_s,
        )

    def _oldest(self, lane: _Lane) -> int:
        while not self._waits[lane.arrived[0]]:
            lane.arrived.popleft()
        return lane.arrived[0]
