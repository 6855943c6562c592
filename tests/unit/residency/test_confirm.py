"""
What the cards must show after an engine's end: on every small world, and in rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import product

import pytest

from tests.factories import GIB, make_gpu, make_machine
from worker.hardware.gpu import Machine
from worker.residency.confirm import (
    Held,
    Owed,
    confirm_freed,
    owed_after_failure,
    owed_after_sleep,
    owed_after_stop,
    shifted,
)

CARDS = (0, 1)


def machine(*free_gib: float | None, processes: Mapping[int, Mapping[int, int]] | None = None) -> Machine:
    """Cards of 24 GiB with so much free each; None = the driver does not say. Processes: card -> pid -> GiB."""
    gpus = [
        replace(
            make_gpu(24, index=index, free_gib=free or 0),
            free_bytes=None if free is None else int(free * GIB),
            processes={pid: size * GIB for pid, size in (processes or {}).get(index, {}).items()},
        )
        for index, free in enumerate(free_gib)
    ]
    return replace(make_machine(24), gpus=tuple(gpus))


def test_what_a_load_took_is_what_its_stop_must_give_back() -> None:
    """On every pair of cards: loaded, stopped, and so much of it back; what is missing beyond noise is noticed."""
    for first, second, back in product((0, 2, 10), (0, 3, 20), (0.0, 0.5, 0.9, 1.0)):
        before, loaded = machine(24, 22), machine(24 - first, 22 - second)
        held = shifted(Held(pids=(7,)), before, loaded, CARDS)
        owed = owed_after_stop("m", held, loaded, CARDS)
        after = machine(24 - first * (1 - back), 22 - second * (1 - back))

        missing = [card for card, size in enumerate((first, second)) if size * (1 - back) > max(0.25, size / 20)]
        assert [f"card {card} has" in " ".join(confirm_freed(owed, after)) for card in CARDS] == [
            card in missing for card in CARDS
        ], (first, second, back)


def test_one_card_does_not_pay_for_another() -> None:
    """What is free on card 1 says nothing of card 0."""
    owed = Owed(model_id="m", free={0: 20 * GIB})

    assert confirm_freed(owed, machine(10, 24)) == ("card 0 has 10.0 GiB free, 20.0 GiB were expected",)
    assert confirm_freed(owed, machine(20, 0)) == ()


def test_a_process_that_the_driver_still_counts_is_named() -> None:
    """Whatever is free; another program's processes are nobody's debt."""
    owed = Owed(model_id="m", pids=(7, 8))

    assert confirm_freed(owed, machine(24, 24, processes={1: {7: 2, 8: 1, 9: 5}})) == (
        "process 7, 8 still holds 3.0 GiB of card 1",
    )
    assert confirm_freed(owed, machine(0, 0, processes={0: {9: 20}})) == ()


@pytest.mark.parametrize(
    ("held", "now", "expected"),
    [
        # The driver counts 10 GiB for the processes: that, whatever the load seemed to take.
        (Held(pids=(7,), taken={0: 3 * GIB}), machine(4, 24, processes={0: {7: 10, 9: 1}}), {0: 13.5}),
        # It does not say which process holds what: what the load took. 4 + 3 - 0.25.
        (Held(pids=(7,), taken={0: 3 * GIB}), machine(4, 24), {0: 6.75}),
        (Held(pids=(7,)), machine(4, 24), {}),  # nobody knows
        (Held(pids=(7,), taken={0: 3 * GIB}), machine(None, 24), {}),  # nobody can look
    ],
)
def test_what_is_owed_after_a_stop(held: Held, now: Machine, expected: dict[int, float]) -> None:
    """Rows: GiB that must be free on each card."""
    owed = owed_after_stop("m", held, now, CARDS)

    assert owed.pids == held.pids
    assert {card: size / GIB for card, size in owed.free.items()} == expected


def test_a_failed_load_owes_what_was_free_before_it() -> None:
    """On its own cards; a little less is noise."""
    owed = owed_after_failure("m", machine(20, 10), (0,))

    assert owed.free == {0: 19.75 * GIB}
    assert owed_after_failure("m", machine(20, 10), ()).free == {}


def test_a_card_that_is_gone_owes_nothing() -> None:
    """The check before the load says that it is gone."""
    assert confirm_freed(Owed(model_id="m", pids=(7,), free={0: GIB}), make_machine()) == ()


@pytest.mark.parametrize(
    ("freed", "back", "lacks"),
    [(10, 10, False), (10, 9.6, False), (10, 9, True), (10, 0, True), (1, 0.8, False), (1, 0.7, True), (0, 0, False)],
)
def test_a_sleeper_must_give_back_what_it_slept_for(freed: float, back: float, lacks: bool) -> None:  # noqa: FBT001
    """Its process still holds something: only what is free is looked at. Rows of GiB; 5 % or 256 MiB are noise."""
    awake = machine(6, 24, processes={0: {7: 18}})
    owed = owed_after_sleep("m", awake, (0,), int(freed * GIB))
    asleep = machine(6 + back, 24, processes={0: {7: 18 - int(back)}})

    assert bool(confirm_freed(owed, asleep)) == lacks


def test_what_is_held_follows_a_model_through_its_sleep() -> None:
    """Loaded 18 GiB, asleep 2, awake 18 again: each time what its end must give back."""
    free, awake, asleep = machine(24), machine(6), machine(22)
    held = shifted(Held(pids=(7,)), free, awake, (0,))
    assert held.taken == {0: 18 * GIB}

    held = shifted(held, awake, asleep, (0,))
    assert (held.pids, held.taken) == ((7,), {0: 2 * GIB})
    assert shifted(held, asleep, awake, (0,)).taken == {0: 18 * GIB}
    assert shifted(held, awake, free, (0,)).taken == {0: 0}, "less than nothing is not held"
