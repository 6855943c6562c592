"""
Who leaves is who is missed least: jobs in flight, jobs that wait, the seconds until it is back, and only then bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from itertools import combinations, product

import pytest

from common.schemas import SwitchTime
from tests.factories import GIB, make_placement, make_spec
from tests.switch_world import World
from worker.catalog.spec import EngineKind
from worker.memory.estimate import MemoryEstimate
from worker.residency.plan import Missed, plan_switch
from worker.state.backlog import Backlog, Waiting
from worker.state.residency import Level, Residency, Resident

CARD = 10
ROWS = [  # (bytes, jobs in flight, do jobs wait for it, seconds until it is back)
    (size, busy, waits, back_s) for size in (2, 4) for busy in (0, 1) for waits in (False, True) for back_s in (1, 9)
]


def world_of(sizes: Sequence[tuple[int, int]], places: int = 3) -> Residency:
    residents = tuple(
        Resident(model_id=name, level=Level.READY, bytes=size, since=0.0, gpus=(0,), in_flight=busy)
        for name, (size, busy) in zip("abc", sizes, strict=False)
    )
    return Residency(capacity=0, cards={0: CARD}, max_residents=places, residents=residents)


def cases() -> Iterator[tuple[Residency, Missed]]:
    """Up to three models, each busy or idle, waited for or not, dear or cheap, in two or three places."""
    for count in (1, 2, 3):
        for rows in product(ROWS, repeat=count):
            if sum(row[0] for row in rows) <= CARD:
                named = dict(zip("abc", rows, strict=False))
                missed = Missed(
                    waited_for=[name for name, row in named.items() if row[2]],
                    back_s={name: row[3] for name, row in named.items()},
                )
                yield world_of([row[:2] for row in rows], places=max(count, 2)), missed


CASES = list(cases())


def enough(world: Residency, size: int) -> list[tuple[Resident, ...]]:
    """Every group whose leaving leaves a place, and the bytes."""
    groups = (group for count in range(4) for group in combinations(world.residents, count))
    stays = ((group, [r for r in world.residents if r not in group]) for group in groups)
    return [g for g, left in stays if len(left) < world.max_residents and sum(r.bytes for r in left) + size <= CARD]


@pytest.mark.parametrize("size", [3, 7])
def test_whoever_is_missed_least_leaves(size: int) -> None:
    """Of all groups that make room none has fewer jobs in flight; of these none is waited for less, or back sooner."""
    for world, missed in CASES:
        stop = plan_switch(world, "new", {0: size}, missed=missed).stop
        left = enough(world, size)
        by_name = {
            r.model_id: (r.in_flight, r.model_id in missed.waited_for, missed.back_s[r.model_id])
            for r in world.residents
        }
        for price in (0, 1, 2):
            prices = [sum(by_name[r.model_id][price] for r in group) for group in left]
            left = [group for group, each in zip(left, prices, strict=True) if each == min(prices)]
        assert stop in [tuple(r.model_id for r in group) for group in left], (world, missed)


@pytest.mark.parametrize("size", [3, 7])
def test_seconds_that_are_known_of_some_only_count_for_none(size: int) -> None:
    """What nobody has measured is neither dear nor cheap."""
    for world, missed in CASES[::5]:
        for unknown in {r.model_id for r in world.residents}:
            some = Missed(waited_for=missed.waited_for, back_s={m: s for m, s in missed.back_s.items() if m != unknown})
            none = Missed(waited_for=missed.waited_for)
            assert plan_switch(world, "new", {0: size}, missed=some) == plan_switch(
                world, "new", {0: size}, missed=none
            ), (world, some)


@pytest.mark.parametrize(
    ("waited_for", "back_s", "stop"),
    [
        ("", {}, ("a",)),  # nothing is known: the fewest bytes
        ("", {"a": 40, "b": 3}, ("b",)),  # the smaller one is dear to bring back
        ("", {"a": 40}, ("a",)),  # b may be dearer still
        ("a", {}, ("b",)),  # the smaller one is needed next
        ("a", {"a": 3, "b": 40}, ("b",)),  # and would have to come back at once, which b need not
        ("ab", {"a": 40, "b": 3}, ("b",)),
    ],
)
def test_of_two_idle_models(waited_for: str, back_s: dict[str, float], stop: tuple[str, ...]) -> None:
    """The first takes 2 bytes, the second 4; there are two places."""
    missed = Missed(waited_for=tuple(waited_for), back_s=back_s)

    assert plan_switch(world_of([(2, 0), (4, 0)], places=2), "new", {0: 3}, missed=missed).stop == stop


# --- Through the switcher ----------------------------------------------------------------------------------


def took(to_model: str, seconds: float) -> SwitchTime:
    return SwitchTime(
        from_model=None, to_model=to_model, level=Level.COLD, mean_s=seconds, last_s=seconds, load_s=seconds,
        load_bytes=None, count=1, at=datetime(2026, 1, 1, tzinfo=UTC),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("times", "waits", "stays"),
    [
        ((), "", {"b"}),
        ((took("a", 40.0), took("b", 3.0)), "", {"a"}),
        ((), "a", {"a"}),
        ((took("a", 3.0), took("b", 40.0)), "a", {"a"}),
    ],
)
def test_the_switcher_asks_what_waits_and_what_was_measured(
    times: tuple[SwitchTime, ...], waits: str, stays: set[str]
) -> None:
    """The first is smaller than the second, and the third needs the place of one of them."""
    sizes = {"a": 6, "b": 8, "c": 9}
    world = World(
        placements={
            name: make_placement(
                name,
                spec=make_spec(name, engine=EngineKind.STUB),
                gpus=(0,),
                memory=MemoryEstimate(weights=size * GIB, kv_cache=0),
            )
            for name, size in sizes.items()
        },
        max_residents=2,
        times=times,
        backlog=Backlog(by_model={name: Waiting(count=3, oldest_at=1.0) for name in waits}),
    )
    world.switch("a")
    world.switch("b")
    world.switch("c")

    assert {*world.levels} == {"c", *stays}
