"""
Whose files are read ahead, in every small world of three models.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations, product

import pytest

from worker.residency.prefetch import Prefetch, choose_prefetch
from worker.state.backlog import Backlog, Waiting
from worker.state.residency import Level, Quarantine, Residency, Resident, Switching

NOW = 1000.0
NOTHING = Residency(capacity=9, max_residents=2)
STANDINGS = ("absent", "ready", "starting", "stopping", "asleep_1", "asleep_2", "quarantined", "forgiven")
WAITS = (None, (1, 990.0), (5, 900.0), (2, None))  # how many jobs, since when; None = nobody says


def world(standings: tuple[str, ...], waits: tuple[tuple[int, float | None] | None, ...]) -> tuple[Backlog, Residency]:
    names = "abc"[: len(standings)]
    residents = tuple(
        Resident(model_id=name, level=Level(standing), bytes=1, since=0)
        for name, standing in zip(names, standings, strict=True)
        if standing in set(Level)
    )
    untils = {"quarantined": NOW + 1, "forgiven": NOW - 1}
    quarantined = {
        name: Quarantine(until=untils[standing], failures=1, reason="")
        for name, standing in zip(names, standings, strict=True)
        if standing in untils
    }
    queues = {
        name: Waiting(count=wait[0] if wait else 0, oldest_at=wait[1] if wait else None)
        for name, wait in zip(names, waits, strict=True)
    }
    return Backlog(by_model=queues), replace(NOTHING, residents=residents, quarantined=quarantined)


WORLDS = [(standings, waits) for standings in product(STANDINGS, repeat=2) for waits in product(WAITS, repeat=2)] + [
    (("ready", *rest), waits) for rest in product(STANDINGS, repeat=2) for waits in product(WAITS, repeat=3)
]


def test_it_is_the_model_that_is_loaded_next() -> None:
    """Weights in files only, with jobs, not just failed; of several the job that waits longest, unknown age last."""
    for standings, waits in WORLDS:
        backlog, residency = world(standings, waits)
        chosen = choose_prefetch(backlog, residency, "abc"[: len(standings)], spare_bytes=7, now=NOW)
        ages = {
            name: (NOW - wait[1] if wait[1] is not None else -1.0)
            for name, standing, wait in zip("abc", standings, waits, strict=False)
            if wait and standing in ("absent", "forgiven", "asleep_2")
        }
        if ages:
            assert chosen.model_id == min(ages, key=lambda name: (-ages[name], name)), (standings, waits)
            assert chosen.most_bytes == 7
        else:
            assert chosen.model_id is None, (standings, waits)


def test_the_order_of_the_models_does_not_matter() -> None:
    """Equal worlds, equal choices."""
    for standings, waits in WORLDS:
        backlog, residency = world(standings, waits)
        names = "abc"[: len(standings)]
        chosen = {choose_prefetch(backlog, residency, o, spare_bytes=7, now=NOW) for o in permutations(names)}
        assert len(chosen) == 1


@pytest.mark.parametrize("spare", [0, -5])
def test_without_memory_to_spare_nothing_is_read(spare: int) -> None:
    """What is free is for the engine that works and for the system."""
    backlog, residency = world(("ready", "absent"), (None, (3, 900.0)))

    assert choose_prefetch(backlog, residency, "ab", spare_bytes=spare, now=NOW) == Prefetch(
        reason="b is next, and no memory is to spare for its files"
    )


def test_while_a_switch_is_under_way_nothing_is_read() -> None:
    """The load has the disk to itself; from the moment it is asked for."""
    for standings, waits in WORLDS:
        backlog, residency = world(standings, waits)
        busy = replace(residency, switching=Switching(to_model="b", epoch=1, since=NOW))
        assert choose_prefetch(backlog, busy, "abc", spare_bytes=7, now=NOW).model_id is None
