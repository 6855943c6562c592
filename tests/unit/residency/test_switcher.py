"""
A switch from end to end on engines in memory: its order, its retries, and what is left when it fails.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from common.errors import (
    LoadFailed,
    ModelMissing,
    RedisUnavailable,
    UnknownModel,
)
from common.schemas import SwitchStage
from tests.factories import make_machine, make_placement, make_spec
from tests.switch_world import LIMITS, World, crash, raising
from worker.catalog.spec import EngineKind
from worker.engines.base import Completion, EngineState


def test_a_first_load_is_told_stage_by_stage() -> None:
    """Nothing to drain; the model answers before it is ready."""
    world = World()
    record = world.switch("a", reason="its turn")

    assert world.deeds == ["fetch a", "[loading]", "load a", "[verifying]", "[ready]"]
    assert world.residency.ready_models == ("a",)
    assert world.residency.switching is None
    assert world.engine.state("a") is EngineState.READY
    assert len(world.engine.calls) == 1
    assert (record.from_model, record.to_model, record.outcome, record.attempts) == (None, "a", "ready", 1)
    assert record.reason == "its turn; nothing is loaded"
    assert world.records == [record]


def test_a_switch_stops_the_old_model_before_it_loads_the_new_one() -> None:
    """Files first, because the old one can serve meanwhile; then drain, unload, load, verify."""
    world = World().with_a_ready()
    record = world.switch("b")

    assert world.deeds == [
        "fetch b", "[draining]", "[unloading]", "stop a", "[loading]", "load b", "[verifying]", "[ready]",
    ]  # fmt: skip
    assert world.residency.ready_models == ("b",)
    assert record.from_model == "a"
    assert set(record.stages) == {"draining", "unloading", "loading", "verifying"}
    assert sum(record.stages.values()) <= record.seconds + 0.001  # each figure is rounded


def test_the_stage_stands_on_the_board_while_it_lasts() -> None:
    """With the epoch; and that the switch has begun, also while files are fetched."""
    world = World()
    seen: list[tuple[bool, SwitchStage | None, int]] = []

    def look() -> None:
        switching = world.residency.switching
        assert switching is not None
        seen.append((switching.begun, switching.stage, switching.epoch))

    def pass_on(completion: Completion) -> Completion:
        look()
        return completion

    world.engine.canary = pass_on
    world.on_fetch = look
    world.switcher.ask("a", 7)
    look()
    world.switch("a", epoch=7)

    assert seen == [(False, None, 7), (True, None, 7), (True, SwitchStage.VERIFYING, 7)]


@pytest.mark.parametrize(("error", "end"), [(None, SwitchStage.READY), (ModelMissing("no file"), SwitchStage.FAILED)])
def test_who_is_told_a_stage_reads_it_on_the_board(error: Exception | None, end: SwitchStage) -> None:
    """The last one too, and then the record of the switch is already kept."""
    world = World().with_a_ready()
    world.engine.load_errors = [error] if error else []
    seen: list[tuple[SwitchStage, int]] = []

    def listen(stage: SwitchStage, _detail: str) -> None:
        switching = world.residency.switching
        assert switching is not None
        assert (switching.to_model, switching.stage) == ("b", stage)
        seen.append((stage, len(world.records)))

    world.switcher.switch("b", on_stage=listen)

    assert [kept for _stage, kept in seen] == [0] * (len(seen) - 1) + [1]
    assert seen[-1] == (end, 1)
    assert world.residency.switching is None


def test_what_a_switch_is_known_to_take_begins_after_its_drain() -> None:
    """And goes on over all stages that follow: the board says since when."""
    world = World().with_a_ready()
    seen: dict[SwitchStage, float | None] = {}

    def listen(stage: SwitchStage, _detail: str) -> None:
        switching = world.residency.switching
        assert switching is not None
        seen[stage] = switching.priced_since

    world.switcher.switch("b", on_stage=listen)

    assert seen.pop(SwitchStage.DRAINING) is None
    assert len(seen) == 4
    assert len(set(seen.values())) == 1
    assert None not in seen.values()


def test_the_old_engine_is_ended_only_when_its_jobs_are() -> None:
    """Draining: nobody new gets in, and the last job out opens the way."""
    world = World().with_a_ready()
    draining = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        with world.board.enter("a"):
            switch = pool.submit(world.switcher.switch, "b", on_stage=lambda *_: draining.set())
            assert draining.wait(10)
            assert "stop a" not in world.deeds
        assert switch.result(10).outcome == "ready"
    assert "hand back a" not in world.deeds


def test_jobs_that_do_not_end_are_handed_back() -> None:
    """After drain_s they are told to stop, and have left before the engine ends."""
    world = World(limits=replace(LIMITS, drain_s=0.01)).with_a_ready()
    with ThreadPoolExecutor(1) as pool:
        with world.board.enter("a"):
            switch = pool.submit(world.switch, "b")
            assert world.handed_back.wait(10)
            assert "stop a" not in world.deeds
        assert switch.result(10).outcome == "ready"
    assert world.deeds.index("hand back a") < world.deeds.index("stop a")


def test_a_load_that_succeeds_at_the_third_try_is_ready() -> None:
    """After each failure nothing is left, and there is a pause."""
    world = World()
    world.engine.load_errors = [LoadFailed("too slow"), LoadFailed("too slow")]
    record = world.switch("a")

    failed = ["[loading]", "load a", "stop a", "pause 2"]
    assert world.deeds == ["fetch a", *failed, *failed, "[loading]", "load a", "[verifying]", "[ready]"]
    assert (record.outcome, record.attempts) == ("ready", 3)
    assert world.residency.ready_models == ("a",)
    assert world.residency.quarantined == {}


def test_a_model_that_never_loads_is_left_alone_longer_each_time() -> None:
    """60 s, 120 s, 240 s; the reason is kept; the old model is back each time."""
    world = World().with_a_ready()
    pauses = []
    for _ in range(3):
        world.engine.load_errors = [LoadFailed("out of memory")] * 3
        record = world.switch("b")
        found = world.residency.quarantined["b"]
        pauses.append(found.until - record.at.timestamp())
        assert (record.outcome, record.attempts, record.reason) == ("failed", 3, "out of memory")
    assert pauses == [pytest.approx(60, abs=1), pytest.approx(120, abs=1), pytest.approx(240, abs=1)]
    assert (found.failures, found.reason) == (3, "out of memory")
    assert world.residency.ready_models == ("a",)
    assert [(r.to_model, r.outcome) for r in world.records] == [("b", "failed"), ("a", "ready")] * 3


def test_success_ends_the_quarantine() -> None:
    """The next failure counts as the first again."""
    world = World()
    world.engine.load_errors = [LoadFailed("busy")] * 3
    world.switch("a")
    assert world.residency.quarantined["a"].failures == 1

    world.switch("a")
    assert world.residency.quarantined == {}


@pytest.mark.parametrize("error", [ModelMissing("no such file"), OSError("no space left on device")])
def test_what_a_retry_cannot_cure_is_tried_once(error: Exception) -> None:
    """The operator's mistake, and what nobody foresaw: quarantined like any failure, or the heart asks for ever."""
    world = World()
    world.engine.load_errors = [error]
    record = world.switch("a")

    assert (record.outcome, record.attempts) == ("failed", 1)
    assert str(error) in record.reason
    assert world.residency.quarantined["a"].reason == record.reason
    assert world.residency.residents == ()
    assert world.engine.state("a") is EngineState.STOPPED


@pytest.mark.parametrize("error", [ModelMissing("the hub has no such file"), OSError("no space left on device")])
def test_files_that_do_not_come_stop_nothing(error: Exception) -> None:
    """The old model serves on; the new one is left alone for a while."""
    world = World().with_a_ready()
    world.on_fetch = raising(error)
    record = world.switch("b")

    assert (record.outcome, record.attempts) == ("failed", 0)
    assert world.residency.ready_models == ("a",)
    assert world.engine.state("a") is EngineState.READY
    assert not any(stage in world.deeds for stage in ("[draining]", "[unloading]", "[loading]", "stop a"))
    assert "b" in world.residency.quarantined


def empty(completion: Completion) -> Completion:
    return replace(completion, response={**completion.response, "choices": []})


@pytest.mark.parametrize(
    ("canary", "says"),
    [
        (empty, "a was loaded but answered its canary prompt with nothing"),
        (crash, "a was loaded but its canary prompt failed: the engine ended"),
    ],
)
def test_a_model_that_does_not_answer_is_not_ready(canary: Callable[[Completion], Completion], says: str) -> None:
    """Loaded is not enough."""
    world = World()
    world.engine.canary = canary
    record = world.switch("a")

    assert (record.outcome, record.attempts) == ("failed", 3)
    assert says in record.reason
    assert world.residency.ready_models == ()
    assert world.engine.state("a") is EngineState.STOPPED


def test_an_embedding_model_gets_an_embedding_canary() -> None:
    """It has no chat to answer in."""
    spec = make_spec("a", engine=EngineKind.STUB, capabilities=frozenset({"embedding"}))
    world = World(placements={"a": make_placement("a", spec=spec)}, machine=make_machine())

    assert world.switch("a").outcome == "ready"
    assert world.engine.calls[0].path == "/v1/embeddings"


def test_a_stale_epoch_does_nothing() -> None:
    """A newer switch was asked for; the older one leaves the board, the engines and the history as they are."""
    world = World().with_a_ready()
    world.switcher.ask("a", 1)
    world.switcher.ask("b", 2)
    before = world.residency
    record = world.switch("a", epoch=1)

    assert record.outcome == "stale"
    assert (world.deeds, world.records, world.residency) == ([], [], before)
    assert world.switch("b", epoch=2).outcome == "ready"


def test_the_last_switch_asked_for_counts_also_after_redis_lost_its_counter() -> None:
    """Its number is smaller then; what was asked under the old count is stale."""
    world = World(epoch=56)
    world.switcher.ask("a", 57)
    world.switcher.ask("b", 1)

    assert world.switch("a", epoch=57).outcome == "stale"
    assert world.switch("b", epoch=1).outcome == "ready"


@pytest.mark.parametrize("epoch", [3, 57])
def test_a_switch_asked_of_an_earlier_start_is_stale(epoch: int) -> None:
    """Whichever way the counter has gone since."""
    assert World(epoch=4).switch("a", epoch=epoch).outcome == "stale"


def test_a_person_s_switch_has_no_epoch_and_is_always_carried_out() -> None:
    """Whatever the heart has asked for."""
    world = World()
    world.switcher.ask("b", 9)

    assert world.switch("a").outcome == "ready"


def test_a_model_that_is_ready_stays_as_it_is() -> None:
    """Nothing is fetched, stopped or loaded."""
    world = World().with_a_ready()
    record = world.switch("a")

    assert (record.outcome, record.reason) == ("ready", "a is ready already")
    assert world.deeds == ["[ready]"]


def test_an_unknown_model_is_refused_by_name() -> None:
    """With the models that there are."""
    world = World()
    with pytest.raises(UnknownModel, match=r"no model 'c'; it has a, b\."):
        world.switch("c")
    assert world.residency.switching is None


def test_a_switch_goes_on_when_nobody_listens() -> None:
    """Redis is away for a moment: its stages and its record are told to nobody, the model is ready all the same."""
    away = raising(RedisUnavailable("nobody answers"))
    world = World(tell=away)

    assert world.switcher.switch("a", on_stage=away).outcome == "ready"
    assert world.residency.ready_models == ("a",)


def test_a_load_gets_the_time_that_its_size_needs() -> None:
    """A disk that gave half a GiB a second so far: 1 GiB takes 2 s, and may take thrice that; the setting is 5 s."""
    world = World(load_speed=2**29)
    record = world.switch("a")

    assert world.engine.timeouts == [pytest.approx(3 * 2)]
    assert record.load_bytes == 2**30
