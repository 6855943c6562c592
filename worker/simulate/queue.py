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
class _Class:
    """The jobs of one class: their sums, and who has had how much of it."""

    priority: int  # its step
    count: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    arrived: deque[int] = field(default_factory=deque)  # in order of arrival; those that run are dropped late
    deadlines: list[tuple[float, int]] = field(default_factory=list)  # a heap; likewise
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
        The bound: who has waited for so long comes first.
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
        self._will_bind: list[tuple[float, _Place]] = []  # a heap, by the moment
        self._classes = {step: _Class(step) for step in PRIORITY_STEPS}
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
        sums = self._classes[PRIORITY_STEPS[job_class]]
        sums.count += 1
        sums.prompt_tokens += job.prompt_tokens
        sums.output_tokens += job.output_tokens
        sums.arrived.append(number)
        if self._by_arrival:
            heappush(self._usual, (0, 0.0, number))
            return sums.count == 1
        place = (job_class, sums.next_tag(job), number)
        heappush(self._usual, place)
        self._will_be_overdue.append(place)
        if job.deadline_s is None:
            return sums.count == 1
        binds_at = (job.arrival_s + job.deadline_s) / 2
        heappush(self._will_bind, (binds_at, (job_class, job.deadline_s, number)))
        heappush(sums.deadlines, (job.deadline_s, number))
        return sums.deadlines[0][1] == number or sums.count == 1

    @property
    def oldest(self) -> int:
        """The job that arrived first."""
        return min(self._oldest(sums) for sums in self._classes.values() if sums.count)

    def alone_s(self) -> tuple[float, float]:
        """Seconds to read all prompts that wait, and of all jobs one after the other."""
        assert self._costs is not None  # noqa: S101
        waiting = [sums for sums in self._classes.values() if sums.count]
        return self._costs.alone_s(
            sum(sums.prompt_tokens for sums in waiting), sum(sums.output_tokens for sums in waiting)
        )

    def take(self, now: float, *, long_s: float | None = None) -> int:
        """Take the job that is served next: of its level and class the longest, if it takes *long_s* or more."""
        if not self._by_arrival:
            self._promote(now)
        level = next(level for level in (self._binding, self._overdue, self._usual) if self._clean(level))
        if long_s is None or level is self._binding or (number := self._overtaker(level, long_s)) is None:
            _, tag, number = heappop(level)
        else:
            tag = 0.0  # the class's time stays as it is
        job = self._jobs[number]
        self._waits[number] = 0
        self._reading = None
        self._count -= 1
        sums = self._classes[PRIORITY_STEPS[class_of(job.priority)]]
        sums.count -= 1
        sums.prompt_tokens -= job.prompt_tokens
        sums.output_tokens -= job.output_tokens
        if not sums.count:
            sums.virtual_time, sums.share_ends = 0.0, {}
        elif level is not self._binding:
            sums.virtual_time = max(sums.virtual_time, tag)
        return number

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
        while self._will_bind and self._will_bind[0][0] <= now:
            heappush(self._binding, heappop(self._will_bind)[1])

    def _clean(self, level: list[_Place]) -> bool:
        """Drop those at the head that run; True if somebody is left."""
        while level and not self._waits[level[0][2]]:
            heappop(level)
        return bool(level)

    def read(self, now: float) -> Waiting:
        """Read the sums, the tenants of a class together; once between two changes, unless a deadline passes."""
        if self._reading is None or now >= self._reading_until:
            lanes = tuple(self._read(sums, now) for sums in self._classes.values() if sums.count)
            oldest = min((lane.oldest_at for lane in lanes if lane.oldest_at is not None), default=None)
            deadlines = (lane.deadline_at for lane in lanes if lane.deadline_at is not None)
            self._reading_until = min(deadlines, default=math.inf)
            self._reading = Waiting(count=self._count, oldest_at=oldest, lanes=lanes)
        return self._reading

    def _read(self, sums: _Class, now: float) -> Lane:
        waits = self._waits
        while sums.deadlines and (not waits[sums.deadlines[0][1]] or sums.deadlines[0][0] <= now):
            heappop(sums.deadlines)
        return Lane(
            count=sums.count,
            oldest_at=self._jobs[self._oldest(sums)].arrival_s,
            newest_at=self._jobs[sums.arrived[-1]].arrival_s,
            priority=sums.priority,
            prompt_tokens=sums.prompt_tokens,
            output_tokens=sums.output_tokens,
            deadline_at=sums.deadlines[0][0] if sums.deadlines else None,
        )

    def _oldest(self, sums: _Class) -> int:
        while not self._waits[sums.arrived[0]]:
            sums.arrived.popleft()
        return sums.arrived[0]
