"""
Whose turn it is where paces, switches, classes, bounds and deadlines are known: in every world of two models.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from worker.scheduling.pick import Knowledge, Turn, pick_turn
from worker.state.backlog import Backlog, Lane, Waiting
from worker.state.pace import Pace
from worker.state.residency import Level, Residency, Resident

NOW = 10_000.0
MAX_WAIT_S = 600.0
MIN_TURN_S = 30.0
SWITCH_S = 5.0


@dataclass(frozen=True)
class Jobs:
    """The jobs that wait for one model; one takes a second."""

    count: int
    age_s: float
    priority: int
    bound_s: float | None
    deadline_in_s: float | None


@dataclass(frozen=True, kw_only=True)
class World:
    """What waits for two models, of which *a* has been ready for so many seconds."""

    a: Jobs
    b: Jobs
    ready_for_s: float | None

    @property
    def presses(self) -> bool:
        """Does the bound or the deadline of b ask for its turn before all jobs of a can have ended?"""
        due_in_s = (self.b.bound_s or MAX_WAIT_S) - self.b.age_s
        if self.b.deadline_in_s is not None:
            due_in_s = min(due_in_s, self.b.deadline_in_s - 1)
        return due_in_s < self.a.count + SWITCH_S


def every_world() -> Iterator[World]:
    kinds = [
        Jobs(count, age_s, priority, bound_s, deadline_in_s)
        for count, age_s, priority in product((1, 60), (0.0, 15.0, 400.0), (0, 3))
        for bound_s, deadline_in_s in ((None, None), (20.0, None), (None, 40.0), (None, 300.0))
    ]
    for a, b, ready_for_s in product(kinds, kinds, (None, 3.0, 500.0)):
        yield World(a=a, b=b, ready_for_s=ready_for_s)


WORLDS = list(every_world())


def pick(world: World, *, later_s: float = 0.0, models: tuple[str, ...] = ("a", "b")) -> Turn:
    now = NOW + later_s

    def waiting(jobs: Jobs) -> Waiting:
        lane = Lane(
            count=jobs.count,
            oldest_at=now - jobs.age_s,
            newest_at=now - jobs.age_s,
            priority=jobs.priority,
            max_wait_s=jobs.bound_s,
            deadline_at=None if jobs.deadline_in_s is None else now + jobs.deadline_in_s,
        )
        return Waiting(count=lane.count, oldest_at=lane.oldest_at, lanes=(lane,))

    residents: tuple[Resident, ...] = ()
    if world.ready_for_s is not None:
        residents = (Resident(model_id="a", level=Level.READY, bytes=1, since=now - world.ready_for_s),)
    return pick_turn(
        Backlog(by_model={"a": waiting(world.a), "b": waiting(world.b)}),
        Residency(
            capacity=9, max_residents=1, residents=residents, switch_s=dict.fromkeys(("a", "b"), SWITCH_S)
        ),
        models,
        now=now, max_wait_s=MAX_WAIT_S, min_turn_s=MIN_TURN_S,
        known=Knowledge(paces=dict.fromkeys("ab", Pace(job_s=1.0))),
    )  # fmt: skip


def test_a_turn_is_for_work_and_says_when_to_look_again() -> None:
    """Both have jobs, so one of them gets the turn; what is asked for lies ahead."""
    for world in WORLDS:
        turn = pick(world)
        assert turn.model_id in ("a", "b"), world
        assert turn.until is None or turn.until > NOW, world


def test_neither_the_clock_nor_the_order_of_models_matters() -> None:
    """The same world at another time, or read in another order, has the same turn."""
    for world in WORLDS:
        turn = pick(world)
        assert pick(world, models=("b", "a")) == turn, world
        assert pick(world, later_s=4096.0).model_id == turn.model_id, world


def test_what_is_ready_is_left_for_a_promise_or_for_a_more_urgent_class_only() -> None:
    """Short detours aside: one job of b where many of a go on, or one that steady traffic has kept away for long."""
    for world in WORLDS:
        if world.ready_for_s is not None and pick(world).model_id == "b":
            detour = world.b.count == 1 and (world.a.count > 1 or world.b.age_s > MAX_WAIT_S / 4)
            assert world.presses or world.b.priority < world.a.priority or detour, world


def test_a_bound_is_broken_neither_for_a_class_nor_for_a_deadline() -> None:
    """The one job of a is due in five seconds; b may be as urgent as it likes, its own bound is far away."""
    found = 0
    for world in WORLDS:
        if world.ready_for_s == 500.0 and world.a == replace(world.a, count=1, age_s=15.0, bound_s=20.0):
            found += world.b.bound_s is None
            assert world.b.bound_s is not None or pick(world).model_id == "a", world
    assert found > 50


def test_a_turn_just_begun_is_left_for_a_short_bound_only() -> None:
    """Not for a class, a deadline or a usual bound: an overload must not only switch."""
    for world in WORLDS:
        if world.ready_for_s == 3.0 and pick(world).model_id == "b":
            assert world.b.bound_s is not None, world


def test_a_job_is_never_left_to_be_late_where_its_turn_would_harm_nobody() -> None:
    """One job of b, due within the time that a's take, which are in no hurry: it goes as it is due, not later."""
    found = 0
    for world in WORLDS:
        a, b = world.a, world.b
        if world.ready_for_s != 500.0 or b.count != 1 or not world.presses or a != Jobs(60, 0.0, 3, None, None):
            continue
        found += 1
        due_in_s = min((b.bound_s or MAX_WAIT_S) - b.age_s, (b.deadline_in_s or MAX_WAIT_S) - 1)
        turn = pick(world)
        assert turn.model_id == "b" or (turn.until is not None and turn.until - NOW <= max(1.0, due_in_s)), world
    assert found > 5


def test_with_nothing_ready_an_urgent_class_comes_first_unless_a_promise_would_break() -> None:
    """Then the jobs that wait longest."""
    for world in WORLDS:
        a, b = world.a, world.b
        promised = any(jobs.bound_s or jobs.deadline_in_s or jobs.age_s > MAX_WAIT_S / 2 for jobs in (a, b))
        if world.ready_for_s is None and not promised:
            first = min((a.priority, -a.age_s, "a"), (b.priority, -b.age_s, "b"))[2]
            assert pick(world).model_id == first, world
