"""
Every small machine, played through: what is stopped makes room, and nothing is stopped without need.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, permutations, product

import pytest

from worker.residency.plan import SwitchPlan, plan_switch
from worker.state.residency import Level, Residency, Resident

CAPACITY = 10
SIZES = (2, 5, 7)  # two small ones free as much as a middle one takes


def resident(model_id: str, size: int, in_flight: int = 0, level: Level = Level.READY) -> Resident:
    return Resident(model_id=model_id, level=level, bytes=size, since=0.0, in_flight=in_flight)


def worlds() -> list[Residency]:
    """Up to three residents of every size, idle or busy, and every number of places that holds them."""
    kinds = list(product(SIZES, (0, 2)))
    rows = [row for count in range(4) for row in product(kinds, repeat=count) if sum(s for s, _ in row) <= CAPACITY]
    return [
        Residency(
            capacity=CAPACITY,
            max_residents=places,
            residents=tuple(resident(name, size, busy) for name, (size, busy) in zip("abc", row, strict=False)),
        )
        for row in rows
        for places in (1, 2, 3)
        if len(row) <= places
    ]


WORLDS = worlds()


def has_room(residency: Residency, size: int) -> bool:
    return len(residency.residents) < residency.max_residents and size <= residency.free


def without(residency: Residency, names: tuple[str, ...]) -> Residency:
    return replace(residency, residents=tuple(r for r in residency.residents if r.model_id not in names))


@pytest.mark.parametrize("size", SIZES)
def test_after_the_plan_the_model_fits(size: int) -> None:
    """Played on a copy: what the plan stops is there, and leaves a place and the bytes."""
    for world in WORLDS:
        plan = plan_switch(world, "new", size)
        assert plan.start == "new"
        assert set(plan.stop) <= {r.model_id for r in world.residents}
        assert has_room(without(world, plan.stop), size), (world, plan)


@pytest.mark.parametrize("size", SIZES)
def test_no_model_is_stopped_without_need(size: int) -> None:
    """Spare any one of those that are stopped, and the new one has no room."""
    for world in WORLDS:
        plan = plan_switch(world, "new", size)
        for spared in plan.stop:
            fewer = tuple(name for name in plan.stop if name != spared)
            assert not has_room(without(world, fewer), size), (world, plan, spared)


@pytest.mark.parametrize("size", SIZES)
def test_the_fewest_jobs_are_interrupted(size: int) -> None:
    """No other group that makes room has fewer jobs in flight; so a busy model goes only if no idle ones suffice."""
    for world in WORLDS:
        plan = plan_switch(world, "new", size)
        names = [r.model_id for r in world.residents]
        in_flight = {r.model_id: r.in_flight for r in world.residents}
        enough = [
            group
            for count in range(len(names) + 1)
            for group in combinations(names, count)
            if has_room(without(world, group), size)
        ]
        least = min(sum(in_flight[name] for name in group) for group in enough)
        assert sum(in_flight[name] for name in plan.stop) == least, (world, plan)


@pytest.mark.parametrize("size", SIZES)
def test_the_order_of_the_residents_does_not_matter(size: int) -> None:
    """Equal worlds, equal plans, ties included."""
    for world in WORLDS:
        plans = {plan_switch(replace(world, residents=order), "new", size) for order in permutations(world.residents)}
        assert len(plans) == 1, world


def test_a_model_that_is_ready_changes_nothing() -> None:
    """Also when it is busy, and whatever size is asked."""
    for world in WORLDS:
        for found in world.residents:
            plan = plan_switch(world, found.model_id, CAPACITY + 1)
            assert plan == SwitchPlan(reason=f"{found.model_id} is ready already")


def test_a_model_larger_than_the_machine_changes_nothing() -> None:
    """The reason has both figures."""
    for world in WORLDS:
        assert plan_switch(world, "new", 11) == SwitchPlan(reason="new takes 11 bytes, more than the 10 there are")


@pytest.mark.parametrize("level", [Level.STARTING, Level.STOPPING])
def test_what_is_left_of_a_broken_load_goes_first(level: Level) -> None:
    """It is the same model: it must not count as its own neighbour."""
    world = Residency(
        capacity=10, max_residents=2, residents=(resident("new", 7, level=level), resident("a", 7), resident("b", 1))
    )

    assert plan_switch(world, "new", 7).stop == ("new", "a")
    assert plan_switch(without(world, ("a",)), "new", 7).stop == ("new",)


@pytest.mark.parametrize(
    ("residents", "places", "size", "stop", "reason"),
    [
        ((), 1, 4, (), "nothing is loaded"),
        ((("a", 4, 0),), 2, 4, (), "new fits beside a"),
        ((("a", 4, 3),), 1, 4, ("a",), "new takes the place of a"),
        ((("a", 4, 3), ("b", 4, 0)), 3, 4, ("b",), "new takes the place of b"),  # 10 - 8 < 4; b has no jobs
        ((("a", 4, 1), ("b", 1, 0)), 3, 7, ("a",), "new takes the place of a"),  # only a's bytes are enough
        ((("a", 5, 1), ("b", 2, 0), ("c", 2, 0)), 4, 5, ("b", "c"), "new takes the place of b, c"),  # two idle for one
        ((("a", 4, 0), ("b", 1, 0)), 2, 1, ("b",), "new takes the place of b"),  # a place is needed: fewest bytes
        ((("b", 4, 0), ("a", 4, 0)), 2, 1, ("a",), "new takes the place of a"),  # all equal: by name
        ((("a", 4, 0), ("b", 4, 0)), 2, 10, ("a", "b"), "new takes the place of a, b"),
    ],
)
def test_what_goes_and_why(
    residents: tuple[tuple[str, int, int], ...], places: int, size: int, stop: tuple[str, ...], reason: str
) -> None:
    """Rows of (name, bytes, jobs in flight) on a machine of 10 bytes."""
    world = Residency(capacity=10, max_residents=places, residents=tuple(resident(*row) for row in residents))

    assert plan_switch(world, "new", size) == SwitchPlan(stop=stop, start="new", reason=reason)
