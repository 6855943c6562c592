"""
What other programs hold is room for nobody: every small machine, and a switcher beside a program that takes memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import combinations_with_replacement, product

import pytest

from common.errors import OutOfMemory
from tests.factories import GIB, make_gpu, make_machine, make_placement, make_spec
from tests.switch_world import World
from worker.catalog.spec import EngineKind
from worker.engines.base import EngineState
from worker.hardware.gpu import Machine
from worker.memory.estimate import MemoryEstimate
from worker.residency.plan import fitting_beside, plan_switch, see_others
from worker.state.residency import HOST, Level, Residency, Resident, by_place

CARDS = {0: 10, 1: 4}
NEEDS = [by_place(size=size, gpus=gpus) for size, gpus in [(2, (0,)), (7, (0,)), (10, (0,)), (3, (1,)), (4, (0, 1))]]


def resident(model_id: str, size: int, gpus: tuple[int, ...] = (0,)) -> Resident:
    return Resident(model_id=model_id, level=Level.READY, bytes=size, since=0.0, gpus=gpus)


def worlds() -> list[Residency]:
    """Up to three models on two cards, and other programs that hold any part of what these leave of the first."""
    kinds = list(product((1, 2, 5), ((0,), (1,), (0, 1))))
    rows = [row for count in range(4) for row in combinations_with_replacement(kinds, count)]
    found = []
    for row, places, held in product(rows, (1, 2, 3), range(11)):
        residents = tuple(resident(name, size, gpus) for name, (size, gpus) in zip("abc", row, strict=False))
        world = Residency(
            capacity=0, cards=CARDS, max_residents=places, residents=residents, others={0: held, 1: 0, HOST: 0}
        )
        if len(row) <= places and min(world.free().values()) >= 0:
            found.append(world)
    return found


WORLDS = worlds()


def without(world: Residency, names: tuple[str, ...]) -> Residency:
    return replace(world, residents=tuple(r for r in world.residents if r.model_id not in names))


def has_room(world: Residency, need: Mapping[int, int]) -> bool:
    """Counted by hand, place by place."""
    left = {place: size - world.others[place] for place, size in {**CARDS, HOST: 0}.items()}
    for found in world.residents:
        for gpu in found.gpus:
            left[gpu] -= found.bytes
    return len(world.residents) < world.max_residents and all(size <= left[place] for place, size in need.items())


@pytest.mark.parametrize("need", NEEDS)
def test_no_model_counts_on_what_other_programs_hold(need: Mapping[int, int]) -> None:
    """Played on a copy: it fits beside them, or has all that they leave; and no model of ours leaves in vain."""
    for world in WORLDS:
        plan = plan_switch(world, "new", need)
        to_be_had = {place: min(size, {**CARDS, HOST: 0}[place] - world.others[place]) for place, size in need.items()}
        assert plan.start == "new"
        assert has_room(without(world, plan.stop), to_be_had), (world, plan)
        for spared in plan.stop:
            fewer = without(world, tuple(name for name in plan.stop if name != spared))
            assert not has_room(fewer, to_be_had), (world, plan, spared)


@pytest.mark.parametrize("need", NEEDS)
def test_what_other_programs_hold_makes_no_model_fit_beside(need: Mapping[int, int]) -> None:
    """Only what is really free does, unless ours leave and others hold the rest all the same."""
    for world in WORLDS:
        if has_room(world, need):
            assert fitting_beside(world, {"new": need}) == {"new"}
        elif fitting_beside(world, {"new": need}):
            assert not any(0 in r.gpus for r in world.residents), world
            assert need[0] > CARDS[0] - world.others[0]


@pytest.mark.parametrize(
    ("free", "ram", "others"),
    [
        (6, 8, {0: 0, HOST: 0}),  # 10 - 4, and 8: nobody else is here
        (7, 9, {0: 0, HOST: 0}),  # a takes less than its plan says
        (1, 8, {0: 5, HOST: 0}),
        (6, 2, {0: 0, HOST: 6}),
        (0, 0, {0: 6, HOST: 8}),
        (None, 8, {HOST: 0}),  # the card does not say
    ],
)
def test_others_hold_what_we_call_free_and_the_machine_does_not(
    free: int | None, ram: int, others: Mapping[int, int]
) -> None:
    """One model of 4 bytes on a card of 10, and a host of 8 of which it takes nothing."""
    world = Residency(capacity=8, cards={0: 10}, max_residents=2, residents=(resident("a", 4),))
    machine = replace(make_machine(), gpus=(replace(make_gpu(), free_bytes=free),), ram_available_bytes=ram)

    seen = see_others(world, machine)
    assert seen.others == others
    assert see_others(seen, machine) == seen


# --- Through the switcher ----------------------------------------------------------------------------------


class Box(World):
    """A card of 24 GiB that holds its models, and what another program takes of it."""

    others: int = 0

    def read(self) -> Machine:
        ready = [name for name in self.placements if self.engine.state(name) is not EngineState.STOPPED]
        free = 24 * GIB - self.others - sum(self.placements[name].memory.total for name in ready)
        self.machine = replace(self.machine, gpus=(make_gpu(24, free_gib=free / GIB),))
        return super().read()


def box() -> Box:
    """Two models of 10 GiB, which the card holds side by side."""
    memory = MemoryEstimate(weights=10 * GIB, kv_cache=0)
    placements = {
        name: make_placement(name, spec=make_spec(name, engine=EngineKind.STUB), gpus=(0,), memory=memory)
        for name in "ab"
    }
    return Box(placements=placements, max_residents=2)


def test_an_idle_model_leaves_where_another_program_took_the_room_beside_it() -> None:
    """At once and without a failed attempt; with the memory back, both are ready again."""
    world = box()
    world.switch("a")
    world.others = 6 * GIB

    record = world.switch("b")
    assert (record.outcome, record.attempts, record.reason) == ("ready", 1, "b takes the place of a")
    assert {*world.levels} == {"b"}

    world.others = 4 * GIB
    assert world.switch("a").reason == "a fits beside b"
    assert world.levels == {"a": Level.READY, "b": Level.READY}


def test_a_model_that_ran_out_of_memory_beside_another_has_its_place_the_next_time() -> None:
    """Its plan was wrong, and would be wrong again: given up once beside an idle model, it does not wait for ever."""
    world = box()
    world.switch("a")
    world.engine.load_errors = [OutOfMemory("b ended while it was loading")]

    assert world.switch("b").outcome == "failed"
    assert world.levels == {"a": Level.READY}

    record = world.switch("b")
    assert (record.outcome, record.attempts, record.reason) == ("ready", 1, "b takes the place of a")
    assert world.levels == {"b": Level.READY}


def test_memory_of_a_dead_engine_that_is_on_its_way_back_is_not_another_programs() -> None:
    """It is waited for before the plan is made, so nobody leaves on its account."""
    world = box()
    world.switch("a")
    world.switch("b")
    world.engine.die("b")
    stop, looks = world.engine.ensure_stopped, iter([10 * GIB, 10 * GIB])

    def lags(model_id: str, *, timeout_s: float) -> None:
        stop(model_id, timeout_s=timeout_s)
        world.others = 10 * GIB
        world.on_look = lambda: setattr(world, "others", next(looks, 0))

    world.engine.ensure_stopped = lags  # type: ignore[method-assign]

    assert world.switch("b").reason == "b fits beside a"
    assert world.levels == {"a": Level.READY, "b": Level.READY}
