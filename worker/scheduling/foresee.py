"""
When would the waiting jobs start if the models had their turns in a given order, and which would be late? Pure.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from common.keys import PRIORITY_STEPS
from worker.state.backlog import Lane, Waiting
from worker.state.pace import Pace

Lateness = tuple[float, ...]  # by job class, most urgent first: how much over the bound its worst job is, in bounds

# The promise is the bound, the jobs in flight and one switch. Where these are more than this share of the bound, only
# what breaks the promise is late: else no switch would be in time. A longer bound is kept by itself.
_TIGHT = 0.25


@dataclass(frozen=True, slots=True)
class Group:
    """The jobs of one class that wait for one model."""

    job_class: int  # index into PRIORITY_STEPS
    count: int
    work_s: float | None  # of the engine; None = unknown
    oldest_at: float  # Unix seconds; now where nobody knows
    due_at: float  # Unix seconds when its most pressing job should start: its bound or its deadline, the earlier
    last_due_at: float  # likewise of its last one
    bound_s: float
    by_deadline: bool  # due_at is that of a deadline


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
    def pressing(self) -> Group:
        """The class whose job should start first."""
        return min(self.groups, key=_due_at)

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
    lanes: dict[int, list[Lane]] = {}
    for lane in waiting.by_class:
        lanes.setdefault(class_of(lane.priority), []).append(lane)
    groups = []
    longest_s = 0.0
    for job_class in sorted(lanes):
        together = lanes[job_class]
        whole = together[0] if len(together) == 1 else _join(together)
        work_s, one_s = (pace.work_s(whole), pace.one_s(whole) or 0.0) if pace else (None, 0.0)
        longest_s = max(longest_s, one_s)
        oldest_at, due_at, bound, last_due_at, by_deadline = math.inf, math.inf, bound_s, -math.inf, False
        for lane in together:
            its_bound = lane.max_wait_s or bound_s
            came_at = now if lane.oldest_at is None else lane.oldest_at
            oldest_at, its_due_at = min(oldest_at, came_at), came_at + its_bound
            ends_at = math.inf if lane.deadline_at is None or lane.deadline_at <= now else lane.deadline_at
            binds = ends_at - one_s < its_due_at
            its_due_at = min(its_due_at, ends_at - one_s)
            if its_due_at < due_at:
                due_at, bound, by_deadline = its_due_at, its_bound, binds
            last_due_at = max(last_due_at, math.inf if lane.newest_at is None else lane.newest_at + its_bound)
        groups.append(Group(job_class, whole.count, work_s, oldest_at, due_at, last_due_at, bound, by_deadline))
    first_at = now if waiting.oldest_at is None else waiting.oldest_at
    return Load(model_id, waiting.count, first_at, ready, switch_s, tuple(groups), longest_s)


def _due_at(group: Group) -> float:
    return group.due_at


def _join(lanes: Sequence[Lane]) -> Lane:
    """Sum up lanes of one class: tenants share the places, so one tenant's few jobs leave none of them empty."""
    prompts, outputs = [lane.prompt_tokens for lane in lanes], [lane.output_tokens for lane in lanes]
    return Lane(
        count=sum(lane.count for lane in lanes),
        prompt_tokens=None if None in prompts else sum(filter(None, prompts)),
        output_tokens=None if None in outputs else sum(filter(None, outputs)),
    )


def class_of(priority: int) -> int:
    """The job class of a priority: the place of its list among those that make up a queue."""
    return bisect_right(PRIORITY_STEPS, priority) - 1


def foresee(order: Sequence[Load], *, now: float, drain_s: float = 0.0) -> Foreseen:
    """
    Play *order* from *now* (Unix seconds): every model is served to the end of its queue, its urgent classes first.

    Before the first switch, the jobs in flight end: *drain_s*. If nobody knows the pace of a ready model, its turn
    has no end as long as it goes on; the work of others that is unknown counts nothing.
    """
    late = [0.0] * len(PRIORITY_STEPS)
    slack = math.inf
    at, switched = now, False
    in_flight_s = 0.0 if order and order[0].ready else drain_s  # else they are a part of its work
    for load in order:
        if not load.ready or switched:
            at += load.switch_s + (0.0 if switched else drain_s)
            switched = True
        for group in load.groups:
            work_s = group.work_s if group.work_s is not None else 0.0 if switched else math.inf
            last_at = at + work_s * (1 - 1 / group.count) if group.count > 1 else at
            over = max(at - group.due_at, last_at - group.last_due_at)
            allowed_s = 0.0 if load.ready or group.by_deadline else in_flight_s + load.switch_s
            if over > (allowed_s if allowed_s > _TIGHT * group.bound_s else 0.0):
                late[group.job_class] = max(late[group.job_class], over / (group.bound_s or 1.0))
            elif not load.ready:
                slack = min(slack, max(0.0, -over))
            at += work_s
    return Foreseen(tuple(late), slack)


LITTLE = 0.05  # of the bound: who is late by no more is on time; the promise allows the jobs in flight and a switch
_MUCH = 0.1  # or who is late by no more than this share of what it would be otherwise


def is_better(other: Foreseen, than: Foreseen) -> bool:
    """
    Is the order behind *other* worth a switch? The most urgent class decides that is much less late in one of them.

    What is late either way is no reason: an overload must not only switch.
    """
    for mine, its in zip(other.late, than.late, strict=True):
        if mine != its and min(mine, its) <= max(LITTLE, _MUCH * max(mine, its)):
            return mine < its
    return False
