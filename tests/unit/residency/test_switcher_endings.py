"""
Engines that die or will not end, and a worker that leaves in the middle of a switch.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from common.errors import (
    EngineTimeout,
)
from common.schemas import SwitchStage
from tests.switch_world import LIMITS, World, crash
from tests.waiting import eventually
from worker.engines.base import Completion, EngineState
from worker.state.residency import Level


def test_an_old_engine_that_will_not_end_fails_the_switch() -> None:
    """Two engines on one card is what must not happen; the next switch ends it first."""
    world = World().with_a_ready()
    world.engine.stop_errors = [EngineTimeout("process 7 is still there")] * 2
    record = world.switch("b")

    assert (record.outcome, record.reason) == ("failed", "process 7 is still there")
    assert "load b" not in world.deeds
    assert world.residency.ready_models == ()

    world.deeds.clear()
    assert world.switch("b").outcome == "ready"
    assert world.deeds.index("stop a") < world.deeds.index("load b")


def test_an_engine_that_died_is_taken_off_the_board() -> None:
    """Once; the other one stays."""
    world = World(max_residents=2)
    world.switch("a")
    world.switch("b")
    assert world.switcher.note_deaths() == ()

    world.engine.die("a")
    assert world.switcher.note_deaths() == ("a",)
    assert world.switcher.note_deaths() == ()
    assert world.residency.ready_models == ("b",)


@pytest.mark.parametrize("noticed", [True, False])
def test_a_dead_engine_is_ended_before_the_next_load(noticed: bool) -> None:  # noqa: FBT001 - a parameter
    """Dead may mean deaf: its processes live and hold their memory, whether or not the heart has seen it."""
    world = World(max_residents=2).with_a_ready()
    world.engine.die("a")
    if noticed:
        world.switcher.note_deaths()

    assert world.switch("b").outcome == "ready"
    assert world.deeds == ["stop a", "fetch b", "[loading]", "load b", "[verifying]", "[ready]"]
    assert world.engine.state("a") is EngineState.STOPPED
    assert world.residency.ready_models == ("b",)


def test_a_dead_engine_is_loaded_anew() -> None:
    """It is not ready already, though the board still says so."""
    world = World().with_a_ready()
    world.engine.die("a")

    assert world.switch("a").outcome == "ready"
    assert world.deeds.index("stop a") < world.deeds.index("load a")


def test_a_dead_engine_that_will_not_end_fails_the_switch() -> None:
    """Two engines on one card is what must not happen."""
    world = World().with_a_ready()
    world.engine.die("a")
    world.engine.stop_errors = [EngineTimeout("process 7 is still there")]
    record = world.switch("b")

    assert (record.outcome, record.reason) == ("failed", "process 7 is still there")
    assert "load b" not in world.deeds


def test_a_failed_load_that_will_not_end_stays_on_the_board() -> None:
    """With its memory; the next switch ends it first."""
    world = World(limits=replace(LIMITS, attempts=1))
    world.engine.canary = crash
    world.engine.stop_errors = [EngineTimeout("process 7 is still there")]
    assert world.switch("a").outcome == "failed"
    assert world.levels == {"a": Level.STOPPING}

    world.engine.canary = lambda completion: completion
    world.deeds.clear()
    assert world.switch("b").outcome == "ready"
    assert world.deeds.index("stop a") < world.deeds.index("load b")


def test_closing_ends_every_engine() -> None:
    """The worker leaves nothing behind."""
    world = World().with_a_ready()
    world.switcher.close()

    assert world.residency.residents == ()
    assert world.engine.state("a") is EngineState.STOPPED


def test_one_switch_at_a_time() -> None:
    """The second waits for the first, and finds what it left."""
    world = World()
    loading, go = threading.Event(), threading.Event()

    def hold(completion: Completion) -> Completion:
        loading.set()
        assert go.wait(10)
        return completion

    world.engine.canary = hold
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(world.switch, "a")
        assert loading.wait(10)
        second = pool.submit(world.switch, "b")
        assert "fetch b" not in world.deeds
        go.set()
        assert [first.result(10).from_model, second.result(10).from_model] == [None, "a"]
    assert world.residency.ready_models == ("b",)


def test_leaving_interrupts_a_load() -> None:
    """Also one whose process was not there yet when it was first told to stop; no pause, no second attempt."""
    world = World(limits=replace(LIMITS, attempt_s=3600), load_s=3600)
    told, loading = threading.Event(), threading.Event()
    stop = world.engine.ensure_stopped

    def ensure_stopped(model_id: str, *, timeout_s: float) -> None:
        stop(model_id, timeout_s=timeout_s)
        told.set()

    def not_there_yet() -> None:
        loading.set()
        assert told.wait(10)

    world.engine.ensure_stopped = ensure_stopped  # type: ignore[method-assign]
    world.engine.on_load = not_there_yet
    with ThreadPoolExecutor(1) as pool:
        switch = pool.submit(world.switch, "a")
        assert loading.wait(10)
        world.switcher.abandon()
        record = switch.result(10)

    assert (record.outcome, record.attempts) == ("failed", 1)
    assert record.reason == "the worker leaves: a was stopped while it was loading."
    assert world.residency.quarantined == {}
    assert world.residency.residents == ()
    assert world.engine.state("a") is EngineState.STOPPED
    assert "pause 2" not in world.deeds
    assert world.deeds[-1] == "[failed]"


@pytest.mark.parametrize("stage", [SwitchStage.DRAINING, SwitchStage.UNLOADING, SwitchStage.LOADING])
def test_leaving_ends_a_switch_at_any_stage(stage: SwitchStage) -> None:
    """What was not begun is not begun; the model is at no fault."""
    world = World(limits=replace(LIMITS, attempt_s=3600)).with_a_ready()
    world.engine._load_s = 3600
    reached, leaving = threading.Event(), threading.Event()

    def listen(told: SwitchStage, _detail: str) -> None:
        if told is stage:
            reached.set()
            assert leaving.wait(10)

    with ThreadPoolExecutor(2) as pool:
        switch = pool.submit(world.switcher.switch, "b", on_stage=listen)
        assert reached.wait(10)
        left = pool.submit(world.switcher.abandon)
        eventually(world.switcher._leaving.is_set)
        leaving.set()
        record = switch.result(10)
        left.result(10)

    assert record.outcome == "failed"
    assert record.reason.startswith("the worker leaves: ")
    assert world.residency.quarantined == {}
    assert world.residency.ready_models == (("a",) if stage is SwitchStage.DRAINING else ())
    assert ("load b" in world.deeds) is (stage is SwitchStage.LOADING)


def test_leaving_does_not_wait_for_a_download() -> None:
    """Gigabytes may take hours; nothing was stopped for them."""
    world = World().with_a_ready()
    fetching, arrived = threading.Event(), threading.Event()

    def fetch() -> None:
        fetching.set()
        arrived.wait(60)

    world.on_fetch = fetch
    with ThreadPoolExecutor(1) as pool:
        switch = pool.submit(world.switch, "b")
        assert fetching.wait(10)
        world.switcher.abandon()
        assert not arrived.is_set()
        arrived.set()
        record = switch.result(10)

    assert record.reason == "the worker leaves: b was not loaded."
    assert world.deeds == ["fetch b", "[failed]"]
    assert world.residency.ready_models == ("a",)


def test_after_leaving_no_switch_begins() -> None:
    """However often the worker is told to leave; one that a person asks for too."""
    world = World().with_a_ready()
    world.switcher.abandon()
    world.switcher.abandon()
    record = world.switch("b", force=True)

    assert record.outcome == "failed"
    assert world.levels == {"a": Level.READY}
    assert world.residency.quarantined == {}
