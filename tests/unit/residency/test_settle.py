"""
Who sleeps, how deeply, and who ends: on every small world of leavers, cards and memory of the host.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations, product

import pytest

from worker.memory.estimate import MemoryEstimate
from worker.residency.settle import Leaver, Rest, by_next_use, rank_levels, rest_at, settle
from worker.state.backlog import Backlog, Waiting
from worker.state.residency import HOST, Level, Resident

ONE, TWO = Level.ASLEEP_1, Level.ASLEEP_2
LIGHT = Rest(level=ONE, held={0: 1, HOST: 4})
DEEP = Rest(level=TWO, held={0: 1, HOST: 1})
LARGE = Rest(level=ONE, held={0: 2, HOST: 7})
CHOICES = ((), (LIGHT,), (DEEP,), (LIGHT, DEEP), (DEEP, LIGHT), (LARGE, DEEP))
NAMES = "abc"


def leavers(rests: tuple[tuple[Rest, ...], ...]) -> list[Leaver]:
    return [Leaver(model_id=name, rests=found) for name, found in zip(NAMES, rests, strict=False)]


WORLDS = [
    (leavers(rests), {0: card, HOST: host}, most)
    for count in range(4)
    for rests in product(CHOICES, repeat=count)
    for card, host, most in product((0, 1, 2, 3), (0, 1, 4, 5, 8, 12), (0, 1, 2, 3))
]


def held_by(worlds_leavers: list[Leaver], chosen: dict[str, Level]) -> dict[int, int]:
    total = {0: 0, HOST: 0}
    for leaver in worlds_leavers:
        for rest in leaver.rests:
            if chosen.get(leaver.model_id) is rest.level:
                for at, size in rest.held.items():
                    total[at] += size
                break
    return total


def test_what_sleeps_has_room_everywhere_and_no_more_sleep_than_may() -> None:
    """On the card and on the host, together; each at one of its own levels."""
    for asked, free, most in WORLDS:
        chosen = dict(settle(asked, free, most=most))
        held = held_by(asked, chosen)
        assert all(held[at] <= free[at] for at in held), (asked, free, chosen)
        assert len(chosen) <= most
        for leaver in asked:
            level = chosen.get(leaver.model_id)
            assert level is None or level in [rest.level for rest in leaver.rests]


def test_nobody_gives_way_to_one_that_is_needed_later() -> None:
    """Of all ways to settle them it is the best for the first, then for the second, then for the third."""
    for asked, free, most in WORLDS:
        best: tuple[int, ...] | None = None
        for ways in product(*[range(len(leaver.rests) + 1) for leaver in asked]):
            taken = {
                leaver.model_id: leaver.rests[way].level
                for leaver, way in zip(asked, ways, strict=True)
                if way < len(leaver.rests)
            }
            held = held_by(asked, taken)
            if len(taken) <= most and all(held[at] <= free[at] for at in held):
                best = ways if best is None else min(best, ways)
        chosen = settle(asked, free, most=most)
        assert best is not None
        assert chosen == {
            leaver.model_id: leaver.rests[way].level
            for leaver, way in zip(asked, best, strict=True)
            if way < len(leaver.rests)
        }, (asked, free, most)


def test_more_memory_never_ends_the_one_that_is_needed_first() -> None:
    """It sleeps at least as well."""
    for asked, free, most in WORLDS:
        if asked and most:
            before = settle(asked, free, most=most).get(asked[0].model_id)
            after = settle(asked, {at: size + 3 for at, size in free.items()}, most=most).get(asked[0].model_id)
            order = [*(rest.level for rest in asked[0].rests), None]
            assert order.index(after) <= order.index(before)


# --- Who is needed next ------------------------------------------------------------------------------------


def resident(name: str, since: float) -> Resident:
    return Resident(model_id=name, level=Level.READY, bytes=1, since=since)


def test_jobs_come_first_then_the_last_use() -> None:
    """In every order of the residents: who has jobs, by the oldest, an unknown age last; then the youngest."""
    ages = {"a": None, "b": 50.0, "c": 10.0}
    for counts in product((0, 2), repeat=3):
        backlog = Backlog(by_model={n: Waiting(count=c, oldest_at=ages[n]) for n, c in zip(NAMES, counts, strict=True)})
        waiting = [name for name in "cba" if dict(zip(NAMES, counts, strict=True))[name]]
        rest = [name for name in "bca" if name not in waiting]  # used at 3, 2 and 1
        residents = [resident("a", 1), resident("b", 3), resident("c", 2)]
        for order in permutations(residents):
            assert by_next_use(order, backlog) == (*waiting, *rest)


# --- Which level saves most --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wake_s", "sleep_s", "start_s", "expected"),
    [
        ({}, {}, None, (ONE, TWO)),  # nothing was measured: the lighter one first
        ({}, {}, 60, (ONE, TWO)),
        ({ONE: 1, TWO: 9}, {}, 60, (ONE, TWO)),
        ({ONE: 9, TWO: 1}, {}, 60, (TWO, ONE)),
        ({ONE: 1, TWO: 9}, {ONE: 20, TWO: 1}, 60, (TWO, ONE)),  # copying the weights out costs more than reading them
        ({ONE: 1, TWO: 9}, {ONE: 4}, 5, ()),  # neither pays
        ({ONE: 3, TWO: 9}, {ONE: 1}, 5, (ONE,)),
        ({ONE: 9}, {}, 5, (TWO,)),  # level 2 was never tried
        ({ONE: 1}, {}, 5, (ONE, TWO)),  # what is known to pay comes before what is not known
        ({TWO: 1}, {}, 5, (TWO, ONE)),
        ({ONE: 9, TWO: 9}, {}, None, (ONE, TWO)),  # what its start takes is unknown
    ],
)
def test_what_saves_most_comes_first_and_what_saves_nothing_is_left_out(
    wake_s: dict[Level, float], sleep_s: dict[Level, float], start_s: float | None, expected: tuple[Level, ...]
) -> None:
    """Rows of seconds: awake again, falling asleep, started anew."""
    assert rank_levels((ONE, TWO), wake_s=wake_s, sleep_s=sleep_s, start_s=start_s) == expected


def test_a_level_that_is_not_offered_is_not_chosen() -> None:
    """Whatever was measured of it."""
    assert rank_levels((TWO,), wake_s={ONE: 0}, sleep_s={}, start_s=60) == (TWO,)
    assert rank_levels((), wake_s={ONE: 0}, sleep_s={}, start_s=60) == ()


# --- What a sleeper takes ----------------------------------------------------------------------------------

MEMORY = MemoryEstimate(weights=100, kv_cache=50, activation=7, cuda_graphs=3, non_torch=2, cuda_context=1)
READY = replace(resident("m", 0), bytes=163, gpus=(0,), host_bytes=10)


@pytest.mark.parametrize(
    ("level", "gpus", "measured", "held"),
    [
        (ONE, (0,), None, {0: 6, HOST: 10 + 200}),  # pinned blocks may be twice as large as what is in them
        (TWO, (0,), None, {0: 6, HOST: 10}),
        (ONE, (0, 1), None, {0: 6, 1: 6, HOST: 10 + 400}),
        (ONE, (0,), 130, {0: 6, HOST: 130}),
    ],
)
def test_what_stays_on_the_card_and_what_goes_to_the_host(
    level: Level, gpus: tuple[int, ...], measured: int | None, held: dict[int, int]
) -> None:
    """The context, the libraries and the graphs stay; weights, cache and activations go."""
    rest = rest_at(level, replace(READY, gpus=gpus), MEMORY, host_bytes=measured)

    assert (rest.level, rest.held) == (level, held)
