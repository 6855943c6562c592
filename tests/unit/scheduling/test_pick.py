"""
Whose turn it is, in every small world: promises that hold in all of them, and a few rows to read.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from itertools import permutations, product
from types import FrameType

import pytest

from worker.scheduling.pick import Knowledge, Turn, pick_turn
from worker.state.backlog import Backlog, Lane, Waiting
from worker.state.pace import Pace
from worker.state.residency import Level, Quarantine, Residency, Resident

NOW = 10_000.0
MAX_WAIT_S = 600.0
MIN_TURN_S = 30.0


@dataclass(frozen=True, kw_only=True)
class Model:
    """One model of a small world."""

    count: int = 0
    age: float | None = None  # of the job at the head, seconds
    standing: str = "absent"  # absent, ready, fresh (ready for 5 s only), starting, quarantined
    in_flight: int = 0

    @property
    def ready(self) -> bool:
        """Do its jobs run now?"""
        return self.standing in ("ready", "fresh")

    @property
    def waited(self) -> float:
        """Seconds; 0 where the age is unknown."""
        return self.age or 0.0


World = dict[str, Model]

SINCE = {"ready": NOW - 100, "fresh": NOW - 5, "starting": NOW}


def pick(
    world: World,
    *,
    starting: str | None = "a",
    order: tuple[str, ...] | None = None,
    places: int = 1,
    beside: Collection[str] = (),
) -> Turn:
    names = order or tuple(world)
    residents = tuple(
        Resident(
            model_id=name,
            level=Level.READY if world[name].ready else Level.STARTING,
            bytes=1,
            since=SINCE[world[name].standing],
            in_flight=world[name].in_flight,
        )
        for name in names
        if world[name].standing in SINCE
    )
    quarantine = Quarantine(until=NOW + 1, failures=1, reason="it does not load")
    residency = Residency(
        capacity=9,
        max_residents=places,
        residents=residents,
        beside=frozenset(beside),
        quarantined={name: quarantine for name in names if world[name].standing == "quarantined"},
    )
    waiting = {
        name: Waiting(count=world[name].count, oldest_at=None if (age := world[name].age) is None else NOW - age)
        for name in names
    }
    return pick_turn(
        Backlog(by_model=waiting), residency, names,
        now=NOW, max_wait_s=MAX_WAIT_S, min_turn_s=MIN_TURN_S, starting=starting,
    )  # fmt: skip


def every_world() -> Iterator[World]:
    """Two models in every state; three in a smaller choice of states."""
    ages = {0: (None,), 1: (None, 0.0, 100.0, 700.0), 5: (None, 0.0, 100.0, 700.0)}
    standings = ("absent", "ready", "fresh", "starting", "quarantined")
    two = [Model(count=n, age=age, standing=s) for n in ages for age in ages[n] for s in standings]
    three = [
        Model(count=n, age=age, standing=s)
        for n, age in ((0, None), (5, 100.0), (1, 700.0))
        for s in ("absent", "ready", "fresh", "quarantined")
    ]
    for models in (*product(two, repeat=2), *product(three, repeat=3)):
        yield dict(zip("abc", models, strict=False))


WORLDS = list(every_world())


def test_a_model_in_quarantine_never_gets_a_turn() -> None:
    """Whatever waits for it."""
    for world in WORLDS:
        for starting in ("a", None):
            turn = pick(world, starting=starting)
            assert turn.model_id is None or world[turn.model_id].standing != "quarantined", world


def test_nobody_s_turn_only_if_nothing_can_be_done() -> None:
    """No job waits for a model that may be loaded, none is ready, and the first one may not be loaded."""
    for world in WORLDS:
        possible = {name: model for name, model in world.items() if model.standing != "quarantined"}
        idle = not any(model.count or model.ready for model in possible.values())
        assert (pick(world).model_id is None) == (idle and "a" not in possible), world
        assert (pick(world, starting=None).model_id is None) == idle, world


def test_a_model_without_jobs_gets_no_turn_while_another_has_some() -> None:
    """A turn is for work."""
    for world in WORLDS:
        turn = pick(world)
        if any(model.count for model in world.values() if model.standing != "quarantined"):
            assert turn.model_id is not None
            assert world[turn.model_id].count, world


def test_no_switch_while_what_is_ready_has_jobs_unless_the_bound_is_broken() -> None:
    """Collation, with its one exception."""
    for world in WORLDS:
        if any(model.ready and model.count for model in world.values()):
            chosen = world[pick(world).model_id or ""]
            assert chosen.ready or chosen.waited > MAX_WAIT_S, world


def test_over_the_bound_the_longest_wait_wins_unless_a_turn_has_just_begun() -> None:
    """The bound on waiting holds in every world."""
    for world in WORLDS:
        waiting = [model for model in world.values() if model.count and model.standing != "quarantined"]
        longest = max((model.waited for model in waiting), default=0.0)
        if longest > MAX_WAIT_S and not any(model.standing == "fresh" for model in waiting):
            assert world[pick(world).model_id or ""].waited == longest, world


def test_a_turn_that_has_just_begun_is_kept() -> None:
    """Even over the bound: an overload must not only switch."""
    for world in WORLDS:
        if any(model.standing == "fresh" and model.count for model in world.values()):
            assert world[pick(world).model_id or ""].standing == "fresh", world


def test_the_order_of_models_and_residents_does_not_matter() -> None:
    """Equal worlds, equal turns, ties included."""
    for world in WORLDS:
        assert len({pick(world, order=order) for order in permutations(world)}) == 1, world


@pytest.mark.parametrize(
    ("world", "turn"),
    [
        ({"a": Model()}, Turn(model_id="a", reason="nothing waits; the model to start with")),
        ({"a": Model(standing="quarantined")}, Turn(model_id=None, reason="nothing waits, and no model can be loaded")),
        (
            {"a": Model(), "b": Model(standing="ready")},
            Turn(model_id="b", reason="nothing waits; it stays ready"),
        ),
        (
            {"a": Model(count=5, age=100), "b": Model(count=1, age=0, standing="ready")},
            Turn(model_id="b", reason="1 of its jobs wait and it is ready"),
        ),
        (
            {"a": Model(count=5, age=700), "b": Model(count=1, age=0, standing="ready")},
            Turn(model_id="a", reason="a job has waited 700 s, the bound is 600 s"),
        ),
        (
            {"a": Model(count=5, age=700), "b": Model(count=1, age=0, standing="fresh")},
            Turn(model_id="b", reason="its turn began 5 s ago"),
        ),
        (
            {"a": Model(count=1, age=100), "b": Model(count=5, age=0), "c": Model(standing="ready")},
            Turn(model_id="a", reason="1 of its jobs wait, none for what is ready"),
        ),
        (
            {"a": Model(count=3, age=100), "b": Model(standing="ready", in_flight=2)},
            Turn(model_id="a", reason="3 of its jobs wait, none for what is ready"),
        ),
        (
            {"a": Model(count=3, age=700), "b": Model(count=1, age=800), "c": Model(standing="ready")},
            Turn(model_id="b", reason="1 of its jobs wait, none for what is ready"),
        ),
        (
            {"a": Model(count=1), "b": Model(count=1, age=0)},  # an unknown age counts as new: a tie, by name
            Turn(model_id="a", reason="1 of its jobs wait, none for what is ready"),
        ),
    ],
)
def test_whose_turn_and_why(world: World, turn: Turn) -> None:
    """One row for each question that needs no more than counts and ages."""
    assert replace(pick(world), until=None, overload=None) == turn


def test_running_jobs_keep_nobody_from_a_free_place() -> None:
    """Where a second model may stand beside the first, nothing has to be waited for."""
    world = {"a": Model(count=3, age=100), "b": Model(standing="ready", in_flight=2)}
    assert pick(world, places=2).model_id == "a"


def test_a_quarantine_ends() -> None:
    """At its end, to the second, the model may be tried again."""
    quarantine = Quarantine(until=NOW, failures=3, reason="")
    residency = Residency(capacity=9, max_residents=1, quarantined={"a": quarantine})

    def turn(now: float) -> Turn:
        backlog = Backlog(by_model={"a": Waiting(count=1, oldest_at=NOW)})
        return pick_turn(backlog, residency, ["a"], now=now, max_wait_s=600, min_turn_s=30)

    assert turn(NOW - 1).model_id is None
    assert turn(NOW).model_id == "a"


def test_a_backlog_of_models_that_are_not_served_here_is_nobody_s_turn() -> None:
    """Only *models* are this worker's."""
    backlog = Backlog(by_model={"elsewhere": Waiting(count=9, oldest_at=0.0)})
    residency = Residency(capacity=9, max_residents=1)

    assert pick_turn(backlog, residency, ["a"], now=NOW, max_wait_s=600, min_turn_s=30).model_id is None


def test_a_model_that_fits_beside_is_loaded_at_once() -> None:
    """Though another one is ready and has jobs, and has just become ready: nothing is stopped for it."""
    for world in WORLDS:
        absent = [name for name, model in world.items() if model.standing == "absent"]
        asked = [name for name in absent if world[name].count]
        loaded = any(model.standing in SINCE for model in world.values())
        late = [m for name, m in world.items() if m.count and m.standing != "quarantined" and name not in asked]
        if not asked or not loaded or any(model.waited > MAX_WAIT_S for model in late):
            continue
        turn = pick(world, places=9, beside=absent)
        assert turn.model_id in asked, world
        assert world[turn.model_id].waited == max(world[name].waited for name in asked), world


def test_a_job_over_the_bound_comes_before_one_that_fits_beside() -> None:
    """Its model needs the whole card, and loading another one first would make it wait longer still."""
    world = {
        "a": Model(count=5, age=10.0, standing="ready"),
        "b": Model(count=1, age=700.0),
        "c": Model(count=1, age=5.0),
    }

    assert pick(world, places=2, beside={"c"}).model_id == "b"
    assert pick(world, places=2, beside={"b", "c"}).model_id == "b"
    assert pick({**world, "b": Model(count=1, age=20.0)}, places=2, beside={"c"}).model_id == "c"


def test_a_decision_costs_the_same_however_many_jobs_wait() -> None:
    """It reads sums: the same steps of Python for ten jobs and for a hundred thousand."""
    assert steps_of_a_decision(jobs=10) == steps_of_a_decision(jobs=100_000)


def steps_of_a_decision(*, jobs: int) -> int:
    """Count the lines that run for one decision between ten models with three classes each."""
    names = [f"m{n}" for n in range(10)]
    lanes = tuple(
        Lane(
            count=jobs // 10,
            priority=priority,
            oldest_at=NOW - 100,
            newest_at=NOW,
            prompt_tokens=10 * jobs,
            output_tokens=10 * jobs,
        )
        for priority in (0, 3, 9)
    )
    backlog = Backlog(
        by_model={name: Waiting(count=3 * (jobs // 10), oldest_at=NOW - 100, lanes=lanes) for name in names}
    )
    ready = Resident(model_id="m4", level=Level.READY, bytes=1, since=NOW - 100)
    residency = Residency(capacity=9, max_residents=1, residents=(ready,), switch_s=dict.fromkeys(names, 5.0))
    pace = Pace(prefill_tokens_per_s=1e9, decode_tokens_per_s=1e9, at_once=8)
    lines = 0

    def count(frame: FrameType, event: str, _argument: object) -> object:
        nonlocal lines
        lines += event == "line" and frame.f_globals.get("__name__", "").startswith("worker.")  # no collector's hooks
        return count

    before = sys.gettrace()
    sys.settrace(count)  # type: ignore[arg-type]
    try:
        turn = pick_turn(
            backlog, residency, names, now=NOW, max_wait_s=MAX_WAIT_S, min_turn_s=MIN_TURN_S,
            known=Knowledge(paces=dict.fromkeys(names, pace)),
        )  # fmt: skip
    finally:
        sys.settrace(before)
    assert turn.model_id == "m4"
    assert lines > 100
    return lines


def test_a_model_that_others_serve_is_theirs_unless_a_share_pays() -> None:
    """Half of 30 s of work is worth a switch of 10 s, half of 10 s is not; what nobody serves comes first."""
    pace = Pace(job_s=1.0)
    residency = Residency(capacity=9, max_residents=1, switch_s={"a": 10.0, "b": 10.0})

    def turn(**counts: int) -> str | None:
        backlog = Backlog(by_model={model: Waiting(count=n, oldest_at=NOW - n) for model, n in counts.items()})
        known = Knowledge(paces={"a": pace, "b": pace}, elsewhere={"a": 1})
        return pick_turn(
            backlog, residency, ["a", "b"], now=NOW, max_wait_s=MAX_WAIT_S, min_turn_s=MIN_TURN_S, known=known
        ).model_id

    assert turn(a=10) is None
    assert turn(a=30) == "a"
    assert turn(a=30, b=1) == "b"


def test_the_bound_of_a_lane_is_its_own() -> None:
    """A tenant who may wait for 50 s only brings its model while others of 600 s do not."""
    pace = Pace(job_s=1.0)
    ready = Resident(model_id="a", level=Level.READY, bytes=1, since=NOW - 1000)
    residency = Residency(capacity=9, max_residents=1, residents=(ready,), switch_s={"a": 2.0, "b": 2.0})

    def turn(max_wait_s: float | None) -> Turn:
        lane = Lane(count=1, oldest_at=NOW - 48, max_wait_s=max_wait_s)
        backlog = Backlog(
            by_model={
                "a": Waiting(count=500, oldest_at=NOW - 40),
                "b": Waiting(count=1, oldest_at=NOW - 48, lanes=(lane,)),
            }
        )
        return pick_turn(
            backlog, residency, ["a", "b"], now=NOW, max_wait_s=MAX_WAIT_S, min_turn_s=MIN_TURN_S,
            known=Knowledge(paces={"a": pace, "b": pace}),
        )  # fmt: skip

    assert turn(50.0).model_id == "b"
    assert turn(None).model_id == "a"


@pytest.mark.parametrize(
    ("lane", "model_id", "reason"),
    [
        (Lane(count=1, oldest_at=NOW - 39.5, max_wait_s=50), "b", "a job has waited 40 s, the bound is 50 s"),
        (Lane(count=1, oldest_at=NOW - 39.5, deadline_at=NOW + 11.5), "a", "500 of its jobs wait and it is ready"),
    ],
)
def test_a_lane_s_bound_is_kept_though_others_are_late_and_a_deadline_waits_for_its_price(
    lane: Lane, model_id: str, reason: str
) -> None:
    """Both are due at the same moment, and batch jobs are late anyway; the turn has not paid for the switches yet."""
    ready = Resident(model_id="a", level=Level.READY, bytes=1, since=NOW - 40)
    residency = Residency(capacity=9, max_residents=1, residents=(ready,), switch_s={"a": 10.0, "b": 10.0})
    batch = Lane(count=500, oldest_at=NOW - 700, priority=9)
    backlog = Backlog(
        by_model={
            "a": Waiting(count=500, oldest_at=batch.oldest_at, lanes=(batch,)),
            "b": Waiting(count=1, oldest_at=lane.oldest_at, lanes=(lane,)),
        }
    )
    turn = pick_turn(
        backlog, residency, ["a", "b"], now=NOW, max_wait_s=MAX_WAIT_S, min_turn_s=MIN_TURN_S,
        known=Knowledge(paces={"a": Pace(job_s=1.0), "b": Pace(job_s=1.0)}),
    )  # fmt: skip
    assert (turn.model_id, turn.reason) == (model_id, reason)


def test_a_short_detour_pays() -> None:
    """Two hundred jobs of 10 ms instead of behind 200 s of others; not while the turn has not paid for it."""
    ready = Resident(model_id="a", level=Level.READY, bytes=1, since=NOW - 1000)
    residency = Residency(capacity=9, max_residents=1, residents=(ready,), switch_s={"a": 2.0, "b": 2.0})
    backlog = Backlog(
        by_model={"a": Waiting(count=200, oldest_at=NOW - 20), "b": Waiting(count=200, oldest_at=NOW - 5)}
    )

    def turn(job_s: float, since: float = NOW - 1000) -> str | None:
        here = replace(residency, residents=(replace(ready, since=since),))
        known = Knowledge(paces={"a": Pace(job_s=1.0), "b": Pace(job_s=job_s)})
        return pick_turn(
            backlog, here, ["a", "b"], now=NOW, max_wait_s=MAX_WAIT_S, min_turn_s=MIN_TURN_S, known=known
        ).model_id

    assert turn(0.01) == "b"
    assert turn(0.1) == "a"
    assert turn(0.01, since=NOW - 50) == "a"


@pytest.mark.parametrize(
    ("jobs_of_a", "jobs_of_b", "said"),
    [
        (500, 0, None),
        (1400, 0, "some jobs will be late by 133% of their bound, whichever model comes first"),
        (500, 50, None),
        (1400, 50, "some jobs will be late by 142% of their bound, whichever model comes first"),
        (1400, 1400, "some jobs will be late by 367% of their bound, whichever model comes first"),
    ],
)
def test_more_work_than_the_bound_allows_is_said(jobs_of_a: int, jobs_of_b: int, said: str | None) -> None:
    """All came just now, a second each: the last of 1,400 starts 799 s after the 600 s that it may wait."""
    pace = Pace(job_s=1.0)
    ready = Resident(model_id="a", level=Level.READY, bytes=1, since=NOW - 1000)
    residency = Residency(capacity=9, max_residents=1, residents=(ready,), switch_s={"a": 2.0, "b": 2.0})

    def waits(count: int) -> Waiting:
        return Waiting(count=count, oldest_at=NOW, lanes=(Lane(count=count, oldest_at=NOW, newest_at=NOW),))

    def overload(**known: Knowledge) -> str | None:
        backlog = Backlog(by_model={"a": waits(jobs_of_a), "b": waits(jobs_of_b)})
        return pick_turn(
            backlog, residency, ["a", "b"], now=NOW, max_wait_s=MAX_WAIT_S, min_turn_s=MIN_TURN_S, **known
        ).overload

    assert overload(known=Knowledge(paces={"a": pace, "b": pace})) == said
    assert overload() is None, "what nobody has measured is no overload"
