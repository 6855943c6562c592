"""
A load that the cards refuse: nothing is stopped for it, and nothing is asked again at once.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import chain, repeat
from typing import Any

import pytest

from common.errors import (
    EngineTimeout,
)
from tests.factories import GIB, make_gpu, make_machine
from tests.switch_world import World, raising
from worker.engines.base import EngineState
from worker.state.residency import Level


@pytest.mark.parametrize(
    ("card", "says"),
    [
        ({"temperature_c": 99.0}, "card 0 is at 99 C"),
        ({"power_w": 400.0, "power_limit_w": 400.0}, "card 0 draws 400 W"),
        ({"free_gib": 1}, "card 0 has 1.0 GiB free"),
    ],
)
def test_a_card_that_is_too_hot_or_too_full_gets_no_model(card: dict[str, Any], says: str) -> None:
    """Refused before the engine is started, tried again after a pause, and forced by whoever insists."""
    world = World(machine=replace(make_machine(24), gpus=(make_gpu(24, **card),)))
    record = world.switch("a")

    assert (record.outcome, record.attempts) == ("failed", 3)
    assert says in record.reason
    assert "load a" not in world.deeds
    assert world.switch("a", force=True).outcome == "ready"


HOT = replace(make_machine(24), gpus=(make_gpu(24, temperature_c=99.0),))


COOL = make_machine(24)


@pytest.mark.parametrize(
    ("card", "says"),
    [({"temperature_c": 99.0}, "card 0 is at 99 C"), ({"power_w": 400.0, "power_limit_w": 400.0}, "draws 400 W")],
)
def test_a_card_that_is_too_hot_keeps_the_model_it_has(card: dict[str, Any], says: str) -> None:
    """Refused before anything is stopped: a hot card that serves is better than a hot card that does not."""
    world = World().with_a_ready()
    world.machine = replace(COOL, gpus=(make_gpu(24, **card),))
    record = world.switch("b")

    assert (record.outcome, record.attempts) == ("failed", 3)
    assert says in record.reason
    assert world.deeds == ["fetch b", "[draining]", "pause 2", "pause 2", "[failed]"]
    assert world.levels == {"a": Level.READY}
    assert world.engine.state("a") is EngineState.READY
    assert "b" in world.residency.quarantined
    with world.board.enter("a"):
        assert world.switch("a").outcome == "ready"


def test_a_card_that_cools_down_in_time_is_loaded() -> None:
    """The pause between two looks is for that."""
    world = World().with_a_ready()
    looks = chain([HOT, HOT], repeat(COOL))

    def look() -> None:
        world.machine = next(looks)

    world.on_look = look
    assert world.switch("b").outcome == "ready"
    assert world.deeds.index("pause 2") < world.deeds.index("stop a")


def test_the_heat_of_the_jobs_themselves_refuses_nothing() -> None:
    """Cards are looked at when the jobs have left; under a full backlog there would never be a switch."""
    world = World().with_a_ready()

    def look() -> None:
        busy = any(resident.in_flight for resident in world.residency.residents)
        world.machine = HOT if busy else COOL

    world.on_look = look
    draining = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        with world.board.enter("a"):
            switch = pool.submit(world.switcher.switch, "b", on_stage=lambda *_: draining.set())
            assert draining.wait(10)
        assert switch.result(10).attempts == 1
    assert world.levels == {"b": Level.READY}


def test_what_was_not_serving_before_a_refusal_is_not_serving_after_it() -> None:
    """An engine that would not end is no engine to give jobs to."""
    world = World().with_a_ready()
    world.engine.stop_errors = [EngineTimeout("process 7 is still there")] * 2
    world.switch("b")
    world.machine = HOT
    world.switch("b")

    assert world.levels == {"a": Level.STOPPING}


def test_cards_that_cannot_be_read_stop_nothing() -> None:
    """The driver's fault, not the old model's."""
    world = World().with_a_ready()
    world.on_look = raising(OSError("driver gone"))

    assert world.switch("b").outcome == "failed"
    assert world.levels == {"a": Level.READY}
    assert "stop a" not in world.deeds


def test_a_model_larger_than_the_machine_is_left_alone() -> None:
    """Nothing is stopped for it, and the heart does not ask again at every beat."""
    world = World(capacity=GIB)
    record = world.switch("a")

    assert (record.outcome, record.attempts) == ("failed", 0)
    assert "more than the" in record.reason
    assert world.deeds == ["[failed]"]
    assert "a" in world.residency.quarantined
