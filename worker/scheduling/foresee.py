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
    due_at: float  # Unix seconds when the bound of one of its jobs is over, the first ...
    last_due_at: float  # ... and the last
    bound_s: float  # of the first
    start_by: float  # Unix seconds when one of them must start to meet its deadline; inf = none has one


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
    due_at: float  # Unix seconds when the first bound of its jobs is over
    start_by: float  # Unix seconds when one of them must start to meet its deadline; inf = none has one

    @property
    def job_class(self) -> int:
        """The most urgent class that waits."""
        return self.groups[0].job_class

    @property
    def pressing(self) -> Group:
        """The class whose bound is over first."""
        return min(self.groups, key=lambda group: group.due_at)

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
    longest_s, first_due_at, first_start_by = 0.0, math.inf, math.inf
    for job_class in sorted(lanes):
        together = lanes[job_class]
        whole = together[0] if len(together) == 1 else _join(together)
        work_s, one_s = (pace.work_s(whole), pace.one_s(whole) or 0.0) if pace else (None, 0.0)
        longest_s = max(longest_s, one_s)
        oldest_at, due_at, bound, last_due_at, start_by = math.inf, math.inf, bound_s, -math.inf, math.inf
        for lane in together:
            its_bound = lane.max_wait_s or bound_s
            came_at = now if lane.oldest_at is None else lane.oldest_at
            oldest_at, its_due_at = min(oldest_at, came_at), came_at + its_bound
            if its_due_at < due_at:
                due_at, bound = its_due_at, its_bound
            if lane.deadline_at is not None and lane.deadline_at > now:
                start_by = min(start_by, lane.deadline_at - one_s)
            last_due_at = max(last_due_at, math.inf if lane.newest_at is None else lane.newest_at + its_bound)
        first_due_at, first_start_by = min(first_due_at, due_at), min(first_start_by, start_by)
        groups.append(Group(job_class, whole.count, work_s, oldest_at, due_at, last_due_at, bound, start_by))
    first_at = now if waiting.oldest_at is None else waiting.oldest_at
    return Load(
        model_id, waiting.count, first_at, ready, switch_s, tuple(groups), longest_s, first_due_at, first_start_by
    )


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


def foresee(
    order: Sequence[Load], *, now: float, drain_s: float = 0.0, least_s: float = 0.0, deadlines: bool = False
) -> Foreseen:
    """
    Play *order* from *now* (Unix seconds): every model is served to the end of its queue, its urgent classes first.

    Who is late is late for its bound, or with *deadlines* for its deadline. Before the first switch, the jobs in
    flight end: *drain_s*; after it, the turn takes *least_s* at least. If nobody knows the pace of a ready model, its
    turn has no end as long as it goes on; the work of others that is unknown counts nothing.
    """
    late = [0.0] * len(PRIORITY_STEPS)
    slack = math.inf
    at, switched = now, False
    in_flight_s = 0.0 if order and order[0].ready else drain_s  # else they are a part of its work
    for load in order:
        leave_at = -math.inf
        if not load.ready or switched:
            at += load.switch_s + (0.0 if switched else drain_s)
            leave_at = -math.inf if switched else at + least_s
            switched = True
        turn_at = at
        for group in load.groups:
            work_s = group.work_s if group.work_s is not None else 0.0 if switched else math.inf
            if deadlines:  # who has one that binds comes before the other classes
                over, allowed_s = turn_at - group.start_by, 0.0
            else:  # so does who is over the bound
                last_at = at + work_s * (1 - 1 / group.count) if group.count > 1 else at
                over = max(turn_at - group.due_at, last_at - group.last_due_at)
                allowed_s = 0.0 if load.ready else in_flight_s + load.switch_s
            if over > (allowed_s if allowed_s > _TIGHT * group.bound_s else 0.0):
                late[group.job_class] = max(late[group.job_class], over / (group.bound_s or 1.0))
            elif not load.ready:
                slack = min(slack, max(0.0, -over))
            at += work_s
        at = max(at, leave_at)
    return Foreseen(tuple(late), slack)


@dataclass(frozen=True, kw_only=True, slots=True)
class Outlook:
    """The orders of turns that are open at *now* (Unix seconds), and what they would do."""

    at_work: Sequence[Load]  # those of ready models
    absent: Sequence[Load]  # the others, in the order in which they would follow
    now: float
    drain_s: float  # until the jobs in flight have ended

    def stay(self, *, deadlines: bool = False) -> Foreseen:
        """Let the turn go on to its end."""
        return foresee([*self.at_work, *self.absent], now=self.now, drain_s=self.drain_s, deadlines=deadlines)

    def go(self, first: Load, *, least_s: float = 0.0, deadlines: bool = False) -> Foreseen:
        """Go to *first* now, for *least_s* at least; then all follow as they are due, or what is ready comes last."""
        others = sorted((load for load in self.absent if load is not first), key=by_due)
        orders = [first, *sorted([*self.at_work, *others], key=by_due)], [first, *others, *self.at_work]
        return min(
            (
                foresee(order, now=self.now, drain_s=self.drain_s, least_s=least_s, deadlines=deadlines)
                for order in orders
            ),
            key=lambda foreseen: foreseen.late,
        )


def by_due(load: Load) -> tuple[float, str]:
    """Who is due first for its bound; ties go by name."""
    return load.due_at, load.model_id


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


def harms(other: Foreseen, otherwise: Foreseen, job_class: int) -> bool:
    """
    Does the order behind *other*, taken for the sake of *job_class*, cost somebody his bound?

    It does if a class is later by it than *otherwise*, and would be on time then (but for LITTLE), or is as urgent as
    *job_class* or more so. A less urgent class that is late either way has no claim.
    """
    pairs = enumerate(zip(other.late, otherwise.late, strict=True))
    return any(late > its and (its <= LITTLE or one <= job_class) for one, (late, its) in pairs)
