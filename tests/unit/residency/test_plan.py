"""
Every small machine, played through: what is stopped makes room, and nothing is stopped without need.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import combinations, combinations_with_replacement, permutations, product

import pytest

from worker.residency.plan import Sleeping, SwitchPlan, fitting_beside, plan_switch
from worker.residency.settle import Rest
from worker.state.residency import HOST, Level, Residency, Resident, by_place

CAPACITY = 10
SIZES = (2, 5, 7)  # two small ones free as much as a middle one takes


def resident(model_id: str, size: int, in_flight: int = 0, level: Level = Level.READY) -> Resident:
    return Resident(model_id=model_id, level=level, bytes=size, since=0.0, in_flight=in_flight, gpus=(0,))


def on_card(size: int) -> dict[int, int]:
    return {0: size}


def worlds() -> list[Residency]:
    """Up to three residents of every size, idle or busy, and every number of places that holds them."""
    kinds = list(product(SIZES, (0, 2)))
    rows = [row for count in range(4) for row in product(kinds, repeat=count) if sum(s for s, _ in row) <= CAPACITY]
    return [
        Residency(
            capacity=0,
            cards={0: CAPACITY},
            max_residents=places,
            residents=tuple(resident(name, size, busy) for name, (size, busy) in zip("abc", row, strict=False)),
        )
        for row in rows
        for places in (1, 2, 3)
        if len(row) <= places
    ]


WORLDS = worlds()


def has_room(residency: Residency, size: int) -> bool:
    return len(residency.residents) < residency.max_residents and size <= residency.free()[0]


def without(residency: Residency, names: tuple[str, ...]) -> Residency:
    return replace(residency, residents=tuple(r for r in residency.residents if r.model_id not in names))


@pytest.mark.parametrize("size", SIZES)
def test_after_the_plan_the_model_fits(size: int) -> None:
    """Played on a copy: what the plan stops is there, and leaves a place and the bytes."""
    for world in WORLDS:
        plan = plan_switch(world, "new", on_card(size))
        assert plan.start == "new"
        assert set(plan.stop) <= {r.model_id for r in world.residents}
        assert has_room(without(world, plan.stop), size), (world, plan)


@pytest.mark.parametrize("size", SIZES)
def test_no_model_is_stopped_without_need(size: int) -> None:
    """Spare any one of those that are stopped, and the new one has no room."""
    for world in WORLDS:
        plan = plan_switch(world, "new", on_card(size))
        for spared in plan.stop:
            fewer = tuple(name for name in plan.stop if name != spared)
            assert not has_room(without(world, fewer), size), (world, plan, spared)


@pytest.mark.parametrize("size", SIZES)
def test_the_fewest_jobs_are_interrupted(size: int) -> None:
    """No other group that makes room has fewer jobs in flight; so a busy model goes only if no idle ones suffice."""
    for world in WORLDS:
        plan = plan_switch(world, "new", on_card(size))
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
        plans = {
            plan_switch(replace(world, residents=order), "new", on_card(size))
            for order in permutations(world.residents)
        }
        assert len(plans) == 1, world


def test_a_model_that_is_ready_changes_nothing() -> None:
    """Also when it is busy, and whatever size is asked."""
    for world in WORLDS:
        for found in world.residents:
            plan = plan_switch(world, found.model_id, on_card(CAPACITY + 1))
            assert plan == SwitchPlan(reason=f"{found.model_id} is ready already")


def test_a_model_larger_than_the_machine_changes_nothing() -> None:
    """The reason has both figures."""
    for world in WORLDS:
        assert plan_switch(world, "new", on_card(11)) == SwitchPlan(
            reason="new takes 11 bytes of card 0, more than the 10 there are"
        )


@pytest.mark.parametrize("level", [Level.STARTING, Level.STOPPING])
def test_what_is_left_of_a_broken_load_goes_first(level: Level) -> None:
    """It is the same model: it must not count as its own neighbour."""
    world = Residency(
        capacity=0,
        cards={0: 10},
        max_residents=2,
        residents=(resident("new", 7, level=level), resident("a", 7), resident("b", 1)),
    )

    assert plan_switch(world, "new", on_card(7)).stop == ("new", "a")
    assert plan_switch(without(world, ("a",)), "new", on_card(7)).stop == ("new",)


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
    world = Residency(
        capacity=0, cards={0: 10}, max_residents=places, residents=tuple(resident(*row) for row in residents)
    )

    assert plan_switch(world, "new", on_card(size)) == SwitchPlan(stop=stop, start="new", reason=reason)


# --- Two unequal cards and the host ------------------------------------------------------------------------

CARDS = {0: 10, 1: 4}
HOST_BYTES = 6
PLACES = ((0,), (1,), (0, 1), ())


def needs(gpus: tuple[int, ...], size: int, host_bytes: int = 0) -> Mapping[int, int]:
    return by_place(size=size, gpus=gpus, host_bytes=host_bytes)


NEEDS = [
    *(needs(gpus, size, host) for gpus, size, host in product(PLACES[:3], (2, 4), (0, 5))),
    needs((0,), 9),
    *(needs((), size) for size in (2, 6)),
]


def card_worlds() -> list[Residency]:
    """Up to three residents on either card, on both, or on the host, some with a part in the host's memory."""
    kinds = [(gpus, size, host) for gpus, size in product(PLACES, (2, 4)) for host in ((0, 4) if gpus else (0,))]
    rows = [row for count in range(4) for row in combinations_with_replacement(kinds, count)]
    found = []
    for row, busy in product(rows, (0, 1)):
        residents = tuple(
            Resident(
                model_id=name, level=Level.READY, bytes=size, since=0.0, gpus=gpus, host_bytes=host,
                in_flight=busy if name == "a" else 0,
            )
            for name, (gpus, size, host) in zip("abc", row, strict=False)
        )  # fmt: skip
        world = Residency(capacity=HOST_BYTES, cards=CARDS, max_residents=3, residents=residents)
        if min(world.free().values()) >= 0:
            found.append(world)
    return found


CARD_WORLDS = card_worlds()


def fits(world: Residency, need: Mapping[int, int]) -> bool:
    """Counted by hand, place by place."""
    taken = {0: 0, 1: 0, HOST: 0}
    for r in world.residents:
        for gpu in r.gpus:
            taken[gpu] += r.bytes
        taken[HOST] += r.host_bytes if r.gpus else r.bytes
    room = {0: 10 - taken[0], 1: 4 - taken[1], HOST: 6 - taken[HOST]}
    return len(world.residents) < world.max_residents and all(size <= room[place] for place, size in need.items())


@pytest.mark.parametrize("need", NEEDS)
def test_every_card_has_room_after_the_plan_and_none_was_cleared_in_vain(need: Mapping[int, int]) -> None:
    """Played on a copy, on two unequal cards; sparing any one of those that are stopped leaves too little somewhere."""
    for world in CARD_WORLDS:
        plan = plan_switch(world, "new", need)
        assert plan.start == "new"
        assert fits(without(world, plan.stop), need), (world, plan)
        for spared in plan.stop:
            assert not fits(without(world, tuple(name for name in plan.stop if name != spared)), need), (world, plan)


def test_what_fits_beside_is_what_needs_no_stop() -> None:
    """A model that is ready already, and one of which something is left, are not among them."""
    asked = {f"new {number}": need for number, need in enumerate(NEEDS)}
    for world in CARD_WORLDS:
        expected = {model for model, need in asked.items() if fits(world, need)}
        assert fitting_beside(world, {**asked, "a": needs((0,), 1)} if world.residents else asked) == expected


def test_two_models_whose_placements_fit_are_ready_together() -> None:
    """One on each card, or both on the larger one; room on the other card is no room."""
    on_first = Residency(capacity=6, cards=CARDS, max_residents=2, residents=(resident("a", 8),))

    assert plan_switch(on_first, "new", needs((1,), 4)).stop == ()
    assert plan_switch(on_first, "new", needs((0,), 2)).stop == ()
    assert plan_switch(on_first, "new", needs((), 6)).stop == ()
    assert plan_switch(on_first, "new", needs((0,), 3)).stop == ("a",)  # 2 + 4 bytes are free, 2 of them there
    assert plan_switch(on_first, "new", needs((0, 1), 3)).stop == ("a",)


@pytest.mark.parametrize(
    ("need", "reason"),
    [
        (needs((1,), 5), "new takes 5 bytes of card 1, more than the 4 there are"),
        (needs((0, 1), 5), "new takes 5 bytes of card 1, more than the 4 there are"),
        (needs((0,), 5, 7), "new takes 7 bytes of the host, more than the 6 there are"),
        (needs((), 7), "new takes 7 bytes of the host, more than the 6 there are"),
        (needs((7,), 1), "new takes 1 bytes of card 7, more than the 0 there are"),  # it does not answer any more
    ],
)
def test_what_no_single_place_holds_changes_nothing(need: Mapping[int, int], reason: str) -> None:
    """Though all cards together would have the bytes."""
    for world in CARD_WORLDS[::7]:
        assert plan_switch(world, "new", need) == SwitchPlan(reason=reason)


# --- Asleep ------------------------------------------------------------------------------------------------

ONE = Level.ASLEEP_1
SMALL = Rest(level=ONE, held={0: 1, HOST: 3})


def sleeper(model_id: str) -> Resident:
    return Resident(model_id=model_id, level=ONE, bytes=1, since=0.0, gpus=(0,), host_bytes=3)


def asleep_worlds() -> list[Residency]:
    """Up to four residents of a card of 10 and a host of 8, each awake with 2 or 5 bytes, or asleep with 1 and 3."""
    kinds: list[int | None] = [2, 5, None]
    found = []
    for count in range(5):
        for row in combinations_with_replacement(kinds, count):
            residents = tuple(
                sleeper(name) if size is None else resident(name, size) for name, size in zip("abcd", row, strict=False)
            )
            for places in (1, 2):
                world = Residency(capacity=8, cards={0: 10}, max_residents=places, residents=residents)
                if min(world.free().values()) >= 0 and len(world.awake) <= places:
                    found.append(world)
    return found


ASLEEP_WORLDS = asleep_worlds()
PLANS = [
    Sleeping(rests=dict.fromkeys(names, (SMALL,)), order=order, most=most, host_bytes=host)
    for names, order, most, host in product(("", "ab", "abcd"), ("abcd", "dcba"), (0, 1, 3), (None, 5))
]


def played(world: Residency, plan: SwitchPlan) -> Residency:
    """The world after *plan*, before the model is made ready."""
    levels = dict(plan.sleep)
    stays = without(world, (*plan.stop, "new")).residents
    return replace(world, residents=tuple(sleeper(r.model_id) if r.model_id in levels else r for r in stays))


@pytest.mark.parametrize("size", [2, 7, 9])
def test_the_model_fits_beside_what_sleeps(size: int) -> None:
    """Played on a copy: what sleepers keep of the card is counted, and so is what they hold of the host."""
    for world, sleeping in product(ASLEEP_WORLDS, PLANS):
        after = played(world, plan_switch(world, "new", on_card(size), sleeping))
        assert size <= after.free()[0], (world, sleeping)
        assert len(after.awake) < world.max_residents
        asleep = [r for r in after.residents if r.level.asleep]
        assert len(asleep) <= sleeping.most
        assert sum(r.host_bytes for r in asleep) <= (8 if sleeping.host_bytes is None else sleeping.host_bytes)


@pytest.mark.parametrize("size", [2, 7, 9])
def test_nothing_that_is_awake_leaves_for_the_sake_of_a_sleeper(size: int) -> None:
    """Who is awake stays or leaves as if no one slept; sleepers only take what is left."""
    for world, sleeping in product(ASLEEP_WORLDS, PLANS):
        plan = plan_switch(world, "new", on_card(size), sleeping)
        alone = plan_switch(replace(world, residents=world.awake), "new", on_card(size))
        awake = {r.model_id for r in world.awake}
        assert {*plan.stop, *dict(plan.sleep)} & awake == {*alone.stop}, (world, plan, alone)


@pytest.mark.parametrize("size", [2, 7, 9])
def test_no_sleeper_ends_while_there_is_room_for_it(size: int) -> None:
    """Each that ended would be one too many: too many asleep, too much of the card, or of the host."""
    for world, sleeping in product(ASLEEP_WORLDS, PLANS):
        plan = plan_switch(world, "new", on_card(size), sleeping)
        after = played(world, plan)
        asleep = [r for r in after.residents if r.level.asleep]
        host = (8 if sleeping.host_bytes is None else sleeping.host_bytes) - sum(r.host_bytes for r in asleep)
        for gone in (r for r in world.residents if r.model_id in plan.stop and r.level.asleep):
            fits = len(asleep) < sleeping.most and after.free()[0] - size >= gone.bytes and host >= gone.host_bytes
            assert not fits, (world, sleeping, plan)


def test_a_model_that_sleeps_is_not_stopped_to_be_woken() -> None:
    """It is made ready in its place; its own residue and weights do not stand in its way."""
    world = Residency(capacity=8, cards={0: 10}, max_residents=1, residents=(sleeper("new"), resident("a", 9)))
    sleeping = Sleeping(rests={"a": (SMALL,)}, order=("new", "a"), most=2)

    assert plan_switch(world, "new", on_card(9), sleeping) == SwitchPlan(
        sleep=(("a", ONE),), start="new", reason="new takes the place of a, a falls asleep (asleep_1)"
    )


def test_a_sleeper_ends_when_another_needs_its_room_more() -> None:
    """Of two that sleep, the one that is needed later; and it is said."""
    world = Residency(capacity=8, cards={0: 10}, max_residents=1, residents=(sleeper("a"), sleeper("b")))
    sleeping = Sleeping(order=("b", "a"), most=2)

    plan = plan_switch(world, "new", on_card(9), sleeping)
    assert (plan.stop, plan.reason) == (("a",), "nothing is loaded, a slept and ends")


def test_what_fits_beside_may_end_sleepers_and_nothing_else() -> None:
    """A model whose jobs wait is made ready at once where only sleepers stand in its way."""
    world = Residency(capacity=8, cards={0: 10}, max_residents=2, residents=(resident("a", 4), sleeper("b")))

    assert fitting_beside(world, {"c": on_card(6), "d": on_card(7)}) == {"c"}
