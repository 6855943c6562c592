"""
A switch from end to end on engines in memory: its order, its retries, and what is left when it fails.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from common.errors import (
    EngineDied,
    EngineTimeout,
    LoadFailed,
    ModelMissing,
    RedisUnavailable,
    UnknownModel,
)
from common.schemas import SwitchRecord, SwitchStage
from tests.factories import GIB, make_gpu, make_machine, make_placement, make_spec
from tests.waiting import eventually
from worker.catalog.spec import EngineKind, ModelSpec
from worker.engines.base import Call, Completion, EngineState, Loaded, StopSignal
from worker.engines.stub import StubEngine
from worker.hardware.gpu import Machine
from worker.residency.board import ResidencyBoard
from worker.residency.check import LoadLimits
from worker.residency.switcher import Switcher, SwitchLimits
from worker.selection.placement import Placement
from worker.state.residency import Level, Residency

LIMITS = SwitchLimits(
    attempt_s=5, attempts=3, drain_s=5, quarantine_s=60, load=LoadLimits(max_temperature_c=85, max_power_share=0.95)
)


class TellingEngine(StubEngine):
    """A stub that writes down what it was asked, and fails as it is told to."""

    def __init__(self, deeds: list[str], *, load_s: float = 0.0) -> None:
        super().__init__(load_s=load_s)
        self._deeds = deeds
        self.load_errors: list[Exception] = []  # one for each of the next loads
        self.stop_errors: list[Exception] = []  # and stops
        self.on_load: Callable[[], object] = lambda: None
        self.canary: Callable[[Completion], Completion] = lambda completion: completion
        self.calls: list[Call] = []

    def ensure_ready(self, placement: Placement, *, timeout_s: float) -> Loaded:
        self._deeds.append(f"load {placement.model_id}")
        if self.load_errors:
            raise self.load_errors.pop(0)
        self.on_load()
        return super().ensure_ready(placement, timeout_s=timeout_s)

    def ensure_stopped(self, model_id: str, *, timeout_s: float) -> None:
        self._deeds.append(f"stop {model_id}")
        if self.stop_errors:
            raise self.stop_errors.pop(0)
        super().ensure_stopped(model_id, timeout_s=timeout_s)

    def generate(self, model_id: str, call: Call, stop: StopSignal) -> Completion:
        self.calls.append(call)
        return self.canary(super().generate(model_id, call, stop))


@dataclass
class World:
    """A switcher, everything it touches, and what it did."""

    machine: Machine = field(default_factory=lambda: make_machine(24))
    limits: SwitchLimits = LIMITS
    placements: Mapping[str, Placement] = field(
        default_factory=lambda: {
            name: make_placement(name, spec=make_spec(name, engine=EngineKind.STUB), gpus=(0,)) for name in "ab"
        }
    )
    deeds: list[str] = field(default_factory=list)  # in the order in which they happened
    records: list[SwitchRecord] = field(default_factory=list)
    handed_back: threading.Event = field(default_factory=threading.Event)
    on_fetch: Callable[[], object] = lambda: None
    on_look: Callable[[], object] = lambda: None  # at the machine
    tell: Callable[[SwitchRecord], object] = lambda _record: None
    capacity: int = 24 * GIB
    max_residents: int = 1
    epoch: int = 0
    load_s: float = 0.0

    def __post_init__(self) -> None:
        self.board = ResidencyBoard(capacity=self.capacity, max_residents=self.max_residents)
        self.engine = TellingEngine(self.deeds, load_s=self.load_s)
        self.switcher = Switcher(
            board=self.board,
            placements=self.placements,
            engines={EngineKind.STUB: self.engine},
            machine=self,
            limits=self.limits,
            fetch=self._fetch,
            hand_back=self._hand_back,
            record=self._record,
            epoch=self.epoch,
            pause=lambda seconds: self.deeds.append(f"pause {seconds:g}"),
        )

    def read(self) -> Machine:
        self.on_look()
        return self.machine

    def _fetch(self, spec: ModelSpec) -> None:
        self.deeds.append(f"fetch {spec.id}")
        self.on_fetch()

    def _record(self, record: SwitchRecord) -> None:
        self.tell(record)
        self.records.append(record)

    def _hand_back(self, model_id: str) -> None:
        self.deeds.append(f"hand back {model_id}")
        self.handed_back.set()

    def switch(self, model_id: str, **options: Any) -> SwitchRecord:
        return self.switcher.switch(
            model_id, on_stage=lambda stage, _detail: self.deeds.append(f"[{stage}]"), **options
        )

    @property
    def residency(self) -> Residency:
        return self.board.read()

    @property
    def levels(self) -> dict[str, Level]:
        return {resident.model_id: resident.level for resident in self.residency.residents}

    def with_a_ready(self) -> World:
        self.switch("a")
        self.deeds.clear()
        self.records.clear()
        return self


def raising(error: Exception) -> Callable[..., None]:
    """A function that raises *error*, whatever it is given."""

    def fail(*_: object) -> None:
        raise error

    return fail


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
    """60 s, 120 s, 240 s; the reason is kept; the old model is gone, and nothing else is on the board."""
    world = World().with_a_ready()
    pauses = []
    for _ in range(3):
        world.engine.load_errors = [LoadFailed("out of memory")] * 3
        record = world.switch("b")
        found = world.residency.quarantined["b"]
        pauses.append(found.until - record.at.timestamp())
        assert (record.outcome, record.attempts, record.reason) == ("failed", 3, "out of memory")
        assert world.deeds[-1] == "[failed]"

    assert pauses == [pytest.approx(60, abs=1), pytest.approx(120, abs=1), pytest.approx(240, abs=1)]
    assert (found.failures, found.reason) == (3, "out of memory")
    assert world.residency.residents == ()
    assert [r.outcome for r in world.records] == ["failed"] * 3


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


def crash(completion: Completion) -> Completion:
    raise EngineDied("the engine ended")


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
    looks = iter([HOT, HOT, COOL, COOL])

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
    world.engine.stop_errors = [EngineTimeout("process 7 is still there")]
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


def test_an_old_engine_that_will_not_end_fails_the_switch() -> None:
    """Two engines on one card is what must not happen; the next switch ends it first."""
    world = World().with_a_ready()
    world.engine.stop_errors = [EngineTimeout("process 7 is still there")]
    record = world.switch("b")

    assert (record.outcome, record.reason) == ("failed", "process 7 is still there")
    assert "load b" not in world.deeds
    assert world.residency.ready_models == ()

    world.deeds.clear()
    assert world.switch("b").outcome == "ready"
    assert world.deeds.index("stop a") < world.deeds.index("load b")


def test_a_switch_goes_on_when_nobody_listens() -> None:
    """Redis is away for a moment: its stages and its record are told to nobody, the model is ready all the same."""
    away = raising(RedisUnavailable("nobody answers"))
    world = World(tell=away)

    assert world.switcher.switch("a", on_stage=away).outcome == "ready"
    assert world.residency.ready_models == ("a",)


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
def test_a_dead_engine_is_ended_before_the_next_load(noticed: bool) -> None:  # noqa: FBT001
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
