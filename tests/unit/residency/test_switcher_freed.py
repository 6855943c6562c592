"""
After an engine's end its memory must be seen free: the next load waits for it, and what never comes is told.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from common.errors import LoadFailed
from tests.factories import GIB, make_gpu, make_machine
from tests.switch_world import LIMITS, World
from worker.engines.base import EngineState

FREE = 23 * GIB
TAKEN = 10 * GIB  # by a model that is loaded


class Card:
    """A card whose memory goes with a load, and comes back so many looks after its end; NVML by a script."""

    def __init__(self, *, late: int, leaks: int = 0, world: World | None = None) -> None:
        self.world = world or World(limits=replace(LIMITS, attempts=2))
        self.late = late
        self.leaks = leaks
        self.since_end = 0
        self.used_before = 0
        self.world.on_look = self.look
        self.look()

    def look(self) -> None:
        loaded = [model for model in "ab" if self.world.engine.state(model) is not EngineState.STOPPED]
        self.since_end = 0 if loaded else self.since_end + 1
        held = TAKEN if loaded or (self.used_before and self.since_end <= self.late) else 0
        self.used_before = max(self.used_before, held)
        free = FREE - max(held, self.leaks if self.used_before else 0)
        self.world.machine = replace(make_machine(24), gpus=(make_gpu(24, free_gib=free / GIB),))


def pauses(world: World) -> int:
    return world.deeds.count("pause 0.2")


@pytest.mark.parametrize("late", [0, 1, 20])
def test_the_next_load_waits_until_the_memory_is_back(late: int) -> None:
    """In the stage of the unload, look by look; no longer than it takes."""
    world = Card(late=late).world
    world.switch("a")
    world.deeds.clear()
    record = world.switch("b")

    assert record.outcome == "ready"
    assert pauses(world) == late
    assert world.deeds.index("[unloading]") < world.deeds.index("stop a") < world.deeds.index("[loading]")
    assert all(world.deeds.index(deed) < world.deeds.index("[loading]") for deed in {"pause 0.2"} & {*world.deeds})
    assert world.residency.unfreed == {}


def test_what_does_not_come_back_is_an_alert_and_is_waited_for_no_longer() -> None:
    """Fifty looks, 10 s; then the check before the load decides, and here enough is free for b."""
    world = Card(late=0, leaks=5 * GIB).world
    world.switch("a")
    world.deeds.clear()
    record = world.switch("b")

    assert record.outcome == "ready"
    assert pauses(world) == 50
    assert world.residency.unfreed == {"a": "card 0 has 18.0 GiB free, 22.5 GiB were expected"}


def test_the_alert_ends_when_the_memory_is_back_after_all() -> None:
    """Seen at the next switch, without waiting."""
    card = Card(late=0, leaks=5 * GIB)
    card.world.switch("a")
    card.world.switch("b")
    assert set(card.world.residency.unfreed) == {"a"}

    card.leaks = 0
    card.world.deeds.clear()
    card.world.switch("a")

    assert card.world.residency.unfreed == {}
    assert pauses(card.world) == 0


def test_a_failed_attempt_is_waited_for_before_the_next_one() -> None:
    """A load that crashed half way held memory too."""
    card = Card(late=3)
    world = card.world
    failed = iter([True, False])

    def crash_once() -> None:
        world.read()
        if next(failed):
            card.used_before, card.since_end = TAKEN, 0
            raise LoadFailed("crashed with the weights on the card")

    world.engine.on_load = crash_once
    record = world.switch("a")

    assert (record.outcome, record.attempts) == ("ready", 2)
    assert pauses(world) == 3
    assert world.residency.unfreed == {}


def test_on_a_host_the_end_of_the_processes_is_enough() -> None:
    """The kernel gives their memory back with them; no card is asked."""
    world = World(machine=make_machine(), capacity=64 * GIB)
    world.placements = {name: replace(plan, gpus=()) for name, plan in world.placements.items()}
    world.switcher._placements = world.placements
    world.switch("a")
    world.switch("b")

    assert pauses(world) == 0
    assert world.residency.ready_models == ("b",)


def test_a_worker_that_leaves_waits_for_no_card() -> None:
    """Its engines end with it."""
    card = Card(late=1000)
    world = card.world
    world.switch("a")
    stop = world.engine.ensure_stopped

    def leave(model_id: str, *, timeout_s: float) -> None:
        world.switcher._leaving.set()
        stop(model_id, timeout_s=timeout_s)

    world.engine.ensure_stopped = leave  # type: ignore[method-assign]
    world.deeds.clear()
    world.switch("b")

    assert pauses(world) == 0
