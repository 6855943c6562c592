"""
When would the waiting jobs start if the models had their turns in a given order, and which would be late? Pure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from common.keys import PRIORITY_STEPS
from worker.state.backlog import Waiting
from worker.state.pace import Pace

Lateness = tuple[float, ...]  # by job class, most urgent first: how much over the bound its worst job is, in bounds


@dataclass(frozen=True, slots=True)
class Group:
    """The jobs of one class that wait for one model."""

    job_class: int  # index into PRIORITY_STEPS
    work_s: float | None  # of the engine; None = unknown
    due_at: float  # Unix seconds when its most pressing job should start: its bound or its deadline, the earlier
    bound_s: float


@dataclass(frozen=True, slots=True)
class Load:
    """What waits for one model."""

    model_id: str
    count: int
    oldest_at: float  # Unix seconds; now where nobody knows
    ready: bool
    switch_s: float  # to make it ready, or ready again; 0 where nobody knows
    groups: tuple[Group, ...]  # the most urgent class first
    one_s: float  # seconds that a usual job of it takes; 0 where nobody knows

    @property
    def job_class(self) -> int:
        """The most urgent class that waits."""
        return self.groups[0].job_class

    @property
    def due_at(self) -> float:
        """When its most pressing job should start, Unix seconds."""
        return min(group.due_at for group in self.groups)

    @property
    def work_s(self) -> float | None:
        """Seconds of the engine for all of it; None = unknown."""
        known = [group.work_s for group in self.groups if group.work_s is not None]
        return sum(known) if len(known) == len(self.groups) else None


@dataclass(frozen=True, slots=True)
class Foreseen:
    """What an order of turns would do to the bounds and deadlines."""

    late: Lateness  # all 0: nothing is late
    slack_s: float  # seconds by which it may begin later without making more late of what is not ready; may be inf


def weigh(
    model_id: str, waiting: Waiting, pace: Pace | None, *, ready: bool, now: float, switch_s: float, bound_s: float
) -> Load:
    """
    Sum up what waits for a model at *now* (Unix seconds); *bound_s* for lanes that have none of their own.

    A lane whose age is unknown counts as new. A deadline that has passed presses nobody.
    """
    groups: dict[int, Group] = {}
    longest_s = 0.0
    for lane in waiting.by_class:
        job_class = class_of(lane.priority)
        work_s, one_s = (pace.work_s(lane), pace.one_s(lane) or 0.0) if pace else (None, 0.0)
        longest_s = max(longest_s, one_s)
        bound = lane.max_wait_s or bound_s
        due_at = (now if lane.oldest_at is None else lane.oldest_at) + bound
        if lane.deadline_at is not None and lane.deadline_at > now:
            due_at = min(due_at, lane.deadline_at - one_s)
        if before := groups.get(job_class):
            work_s = None if work_s is None or before.work_s is None else work_s + before.work_s
            due_at, bound = min((due_at, bound), (before.due_at, before.bound_s))
        groups[job_class] = Group(job_class, work_s, due_at, bound)
    ordered = tuple(groups[job_class] for job_class in sorted(groups))
    oldest_at = now if waiting.oldest_at is None else waiting.oldest_at
    return Load(model_id, waiting.count, oldest_at, ready, switch_s, ordered, longest_s)


def class_of(priority: int) -> int:
    """The job class of a priority: the place of its list among those that make up a queue."""
    return sum(step <= priority for step in PRIORITY_STEPS) - 1


def foresee(order: Sequence[Load], *, now: float) -> Foreseen:
    """
    Play *order* from *now* (Unix seconds): every model is served to the end of its queue, its urgent classes first.

    Before the first switch, the jobs in flight of the model that is ready end. If nobody knows the pace of a ready
    model, its turn has no end as long as it goes on; the work of others that is unknown counts nothing.
    """
    late = [0.0] * len(PRIORITY_STEPS)
    slack = math.inf
    at, switched = now, False
    for load in order:
        if not load.ready or switched:
            at += load.switch_s
            if not switched:
                at += max((ready.one_s for ready in order if ready.ready), default=0.0)
            switched = True
        for group in load.groups:
            over = at - group.due_at
            if over > 0:
                late[group.job_class] = max(late[group.job_class], over / group.bound_s)
            elif not load.ready:
                slack = min(slack, -over)
            at += group.work_s if group.work_s is not None else 0.0 if switched else math.inf
    return Foreseen(tuple(late), slack)


_ENOUGH = 0.7  # where some job is late in any case, another order must cut the worst wait to this share


def is_better(other: Foreseen, than: Foreseen) -> bool:
    """
    Is the order behind *other* worth a switch? The most urgent class in which the two differ decides.

    Nothing late instead of something is. Where something is late either way, only a clearly shorter worst wait is:
    an overload must not only switch.
    """
    for mine, its in zip(other.late, than.late, strict=True):
        if mine == its:
            continue
        if mine < its:
            return mine == 0.0 or 1 + mine <= _ENOUGH * (1 + its)
        if its == 0.0 or 1 + its <= _ENOUGH * (1 + mine):
            return False
    return False
